"""The drafter follows the policy through updates from disk and from tensors, paused or not, once per update."""

import pytest
import torch
from sglang.srt.utils import MultiprocessingSerializer
from transformers import AutoModelForCausalLM

from tests.host.oracle import Oracle
from tests.host.policies import make_policy
from tests.host.servers import greedy, self_quant, tokens

PROMPTS = [[5, 6, 7], [12] * 9, [90, 8, 71, 15, 33], [64, 2]]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def policies(folder):
    return {name: make_policy(folder, "qwen2", seed=seed) for name, seed in (("A", 11), ("B", 12))}


@pytest.fixture(scope="module")
def expected(policies):
    """Greedy outputs, by policy."""
    return {name: [Oracle(path).greedy(prompt, NEW_TOKENS) for prompt in PROMPTS] for name, path in policies.items()}


@pytest.fixture
def server(policies, folder, request):
    log = folder / f"{request.node.name}.log"
    with self_quant(policies["A"], log, {"policy": {"mode": "always"}}, 3) as server:
        yield server


def serve(server):
    """Greedy outputs of the prompts, and (drafted, accepted) tokens on the way."""
    before = server.self_quant()
    outputs = tokens(server.generate({"input_ids": PROMPTS, "sampling_params": greedy(NEW_TOKENS)}))
    after = server.self_quant()
    return outputs, tuple(after[name] - before[name] for name in ("drafted_tokens", "accepted_tokens"))


def update_from_disk(server, path):
    server.post("/update_weights_from_disk", {"model_path": str(path)})


def update_from_tensors(server, path):
    """Two buckets; the q, k and v of every layer straddle them."""
    torch.multiprocessing.set_sharing_strategy("file_system")
    named = list(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict().items())
    late = [(name, tensor) for name, tensor in named if "k_proj" in name or "up_proj" in name or "norm" in name]
    early = [(name, tensor) for name, tensor in named if all(name != other for other, _ in late)]
    for bucket in (early, late):
        server.post(
            "/update_weights_from_tensor",
            {"serialized_named_tensors": [MultiprocessingSerializer.serialize(bucket, output_str=True)]},
        )


def counters(server):
    info = server.self_quant()
    return {name: info[name] for name in ("update_calls", "updates", "failed_updates", "refreshes", "dirty")}


def test_updates(server, policies, expected):
    """A -> B from disk -> A from tensors, paused -> a failed update -> B from disk."""
    outputs, acceptance_a = serve(server)
    assert outputs == expected["A"]
    assert acceptance_a[1] > 0.3 * acceptance_a[0]
    assert counters(server) == {"update_calls": 0, "updates": 0, "failed_updates": 0, "refreshes": 0, "dirty": False}

    update_from_disk(server, policies["B"])
    assert counters(server)["dirty"], "nobody resumed generation: the drafter is refreshed before it drafts"
    outputs, acceptance_b = serve(server)
    assert outputs == expected["B"] != expected["A"]
    assert acceptance_b[1] > 0.1 * acceptance_b[0], "A's drafter would be right once in a hundred tokens"
    assert counters(server) == {"update_calls": 1, "updates": 1, "failed_updates": 0, "refreshes": 1, "dirty": False}

    server.post("/pause_generation", {"mode": "abort"})
    update_from_tensors(server, policies["A"])
    assert counters(server) == {"update_calls": 3, "updates": 1, "failed_updates": 0, "refreshes": 1, "dirty": True}
    server.post("/continue_generation", {})
    assert counters(server) == {"update_calls": 3, "updates": 2, "failed_updates": 0, "refreshes": 2, "dirty": False}
    # The same drafter as at the start, to the last token: neither stale nor made of half an update.
    assert serve(server) == (expected["A"], acceptance_a)

    with pytest.raises(RuntimeError, match="400"):
        update_from_disk(server, "/no/such/policy")
    assert counters(server) == {"update_calls": 4, "updates": 2, "failed_updates": 1, "refreshes": 2, "dirty": True}
    outputs, (drafted, _) = serve(server)
    assert outputs == expected["A"]
    assert drafted == 0
    assert server.self_quant()["decisions"]["gamma=0:update-failed"] > 0

    update_from_disk(server, policies["B"])
    assert serve(server) == (expected["B"], acceptance_b)
    assert counters(server) == {"update_calls": 5, "updates": 4, "failed_updates": 1, "refreshes": 3, "dirty": False}

    # slime's check that an update arrived has no part for derived weights. ("compare", its end, needs CUDA in SGLang.)
    for action in ("snapshot", "reset_tensors"):
        server.post("/weights_checker", {"action": action})
    update_from_disk(server, policies["B"])
    assert serve(server) == (expected["B"], acceptance_b)
