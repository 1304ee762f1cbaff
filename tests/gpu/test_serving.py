"""The real server on one GPU, on two, and with an attention window; head_dim 128, bf16, overlap scheduling. Graphs
equal eager runs bit for bit, and the emitted distribution is the policy's (false-alarm rate 1e-4 a test). bf16 rounding
moves tokens across a filter's edge: filtered cycles are compared with plain steps, which SGLang's own sampler ends."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PROMPT = [17, 4, 88, 23, 61, 9] * 14  # longer than the drafter's sinks and its window
SAMPLES = 1600
NEW_TOKENS = 8
LARGEST_GRAPH_BATCH = 32
CYCLE = {"mode": "cycle", "cycle": [3, 0, 1, 2, 3]}
PENALTIES = {
    "frequency": {"temperature": 0.6, "frequency_penalty": 1.2},
    "presence": {"temperature": 0.6, "presence_penalty": 1.5},
    "repetition": {"temperature": 0.6, "repetition_penalty": 1.4},
    "all": {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2},
    "logit_bias": {"logit_bias": ((5, 3.0), (9, -4.0), (40, 1.5))},
    "bias and penalty": {"frequency_penalty": 0.8, "logit_bias": ((5, 3.0), (9, -4.0), (40, 1.5))},
}
FILTERS = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "top_k+top_p+min_p": {"temperature": 1.3, "top_k": 20, "top_p": 0.85, "min_p": 0.02},
    "top_k+top_p+penalty": {"temperature": 1.3, "top_k": 20, "top_p": 0.85, "frequency_penalty": 0.8},
}


def random_policy(folder: Path, **shape: int) -> Path:
    from er_sglang.bench.toy import PolicyShape, make_random_policy

    shape = PolicyShape(head_dim=128, vocab=100, **shape)
    return make_random_policy(folder / "qwen3", "qwen3", shape=shape, dtype=torch.bfloat16)


def serve(policy: Path, log_path: Path, gpus: int, attention_window: int, window_by: str):
    from er_sglang.config import CONFIG_ENV
    from er_sglang.tools.serving import Server

    plugin = str(Path(__file__).parent / "plugin")
    args = {
        "skip-tokenizer-init": True,
        "dtype": "bfloat16",
        "random-seed": 20240607,
        "cuda-graph-bs": [1, 8, LARGEST_GRAPH_BATCH],
        "cuda-graph-backend-prefill": "disabled",
        "max-running-requests": LARGEST_GRAPH_BATCH,
        "mem-fraction-static": 0.3,
        "tp-size": gpus,
        "speculative-algorithm": "SELF_QUANT",
        "speculative-num-steps": 3,
    }
    drafter = {"attention_window": attention_window, "window_by": window_by}
    env = {
        CONFIG_ENV: json.dumps({"policy": CYCLE, "drafter": drafter}),
        "PYTHONPATH": os.pathsep.join(filter(None, [plugin, os.environ.get("PYTHONPATH")])),
    }
    return Server(policy, args, env=env, log_path=log_path)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    return random_policy(folder, hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2)


@pytest.fixture(
    scope="module",
    params=[(1, 0, "recency"), (2, 0, "recency"), (1, 8, "recency"), (1, 8, "attention")],
    ids=["tp1", "tp2", "window", "attended"],
)
def server(policy, tmp_path_factory, request):
    if torch.cuda.device_count() < (gpus := request.param[0]):
        pytest.skip(f"needs {gpus} GPUs")
    with serve(policy, tmp_path_factory.mktemp("log") / "server.log", *request.param) as server:
        yield server


checks = pytest.mark.parametrize("check, per_batch", [("GRAPH_CHECK", 2 * 3), ("TWIN_CHECK", 3)])


def assert_checked(server, check: str, per_batch: int) -> None:
    from er_sglang.worker import GRAPH_BATCHES

    batches = [batch for batch in GRAPH_BATCHES if batch <= LARGEST_GRAPH_BATCH]
    found = [line for line in server.log_path.read_text().splitlines() if line.startswith(check)]
    assert len(found) == server.get_server_info()["tp_size"] * per_batch * len(batches)


@checks
def test_graphs_equal_eager_runs_and_twins_their_originals(server, check, per_batch) -> None:
    """The plugin compares them at start-up and stops the server at the first difference: draft and verify of gamma 1 to 3;
    logits, keys and values of a token drafted without the twins of small modules."""
    assert_checked(server, check, per_batch)


def test_the_host_never_waits_for_the_gpu(server) -> None:
    """In a cycle, and in what SGLang and we reserve before it; requests are near their length limits from the start on."""
    server.generate(
        {"input_ids": [PROMPT[:20], PROMPT], "sampling_params": [{"max_new_tokens": tokens} for tokens in (20, 30)]}
    )
    waits = server.log_path.read_text().count("called a synchronizing CUDA operation")
    assert waits == server.get_server_info()["tp_size"]  # the plugin provokes one in each process


def test_nothing_is_compiled_while_slots_are_reserved(server) -> None:
    """For batches up to each power of two, of slots that begin anywhere. Cycles do compile, as nothing is measured at this
    server's start."""
    for requests in (1, 2, 3, 5, 9, 17):
        server.generate({"input_ids": [PROMPT] * requests, "sampling_params": {"max_new_tokens": 16 + requests % 2}})
    compiled = [line for line in server.log_path.read_text().splitlines() if line.startswith("COMPILED")]
    assert compiled and not [line for line in compiled if line.endswith("in prepare_for_decode")]


def sample(server, sampling) -> list[list[int]]:
    answers = server.generate({"input_ids": [PROMPT] * SAMPLES, "sampling_params": sampling.params(NEW_TOKENS)})
    return [answer["output_ids"] for answer in answers]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.6}, {}, {"temperature": 1.4}, *PENALTIES.values()],
    ids=["cold", "plain", "hot", *PENALTIES],
)
def test_distribution(server, policy, settings) -> None:
    from tests.host.goodness import assert_exact, cells
    from tests.host.oracle import Oracle, Sampling

    sampling = Sampling(**settings)
    before = server.self_quant()
    assert_exact(cells(Oracle(policy), PROMPT, sample(server, sampling), sampling))
    after = server.self_quant()
    assert after["cycles"] > before["cycles"] and after["decode_steps"] > before["decode_steps"]


@pytest.mark.parametrize(
    "settings, other",
    [({}, {"temperature": 1.1}), (PENALTIES["frequency"], {"temperature": 0.6, "frequency_penalty": 0.7})],
)
def test_wrong_distribution_fails(server, policy, settings, other) -> None:
    """The same check, of the right answers against other settings."""
    from tests.host.goodness import cells, is_exact
    from tests.host.oracle import Oracle, Sampling

    assert not is_exact(cells(Oracle(policy), PROMPT, sample(server, Sampling(**settings)), Sampling(**other)))


def test_filters(server) -> None:
    """Cycles against plain steps. Both are one distribution, and another temperature's is told apart."""
    from tests.host.goodness import assert_exact, cells_of_two, is_exact
    from tests.host.oracle import Sampling

    server.change_self_quant({"mode": "off"})
    plain = {name: sample(server, Sampling(**settings)) for name, settings in FILTERS.items()}
    server.change_self_quant(CYCLE)
    for name, settings in FILTERS.items():
        before = server.self_quant()["drafted_tokens"]
        outputs = sample(server, Sampling(**settings))
        assert_exact(cells_of_two(outputs, plain[name]))
        assert server.self_quant()["drafted_tokens"] > before
        assert not is_exact(cells_of_two(outputs, sample(server, Sampling(**{**settings, "temperature": 2.0}))))


def test_log_probabilities(server, policy) -> None:
    from tests.host.oracle import Oracle

    params = {"temperature": 1.0, "max_new_tokens": 64, "ignore_eos": True}
    answer = server.generate({"input_ids": PROMPT, "sampling_params": params, "return_logprob": True})
    output = answer["output_ids"]
    logits_TV = Oracle(policy).logits(torch.tensor([PROMPT + output]))[0]
    expected = logits_TV[len(PROMPT) - 1 : -1].log_softmax(-1)
    found = torch.tensor([value for value, *_ in answer["meta_info"]["output_token_logprobs"]])
    torch.testing.assert_close(
        found, expected.gather(1, torch.tensor(output).view(-1, 1)).view(-1), rtol=0.03, atol=0.15
    )


@pytest.fixture(scope="module")
def wide_server(tmp_path_factory):
    """Of a policy whose layers can be shared out over the chip."""
    properties = torch.cuda.get_device_properties(0)
    if (properties.major, properties.multi_processor_count) != (9, 132):
        pytest.skip("layers of this width are fused on a chip of 132 multiprocessors")
    folder = tmp_path_factory.mktemp("wide")
    policy = random_policy(folder, hidden=2560, intermediate=2560, layers=3, heads=20, kv_heads=4)
    with serve(policy, tmp_path_factory.mktemp("log") / "server.log", 1, 0, "recency") as server:
        yield server


@checks
def test_fused_layers_are_their_parts(wide_server, check, per_batch) -> None:
    """As above, of drafts whose layers are one kernel for up to 8 requests."""
    assert "Decoder layers fused for a few requests: 2." in wide_server.log_path.read_text()
    assert_checked(wide_server, check, per_batch)
