"""fp8 policies, and an fp8 KV cache, by SGLang's own kernels: exact with respect to what is served, and followed through
updates. A policy's own probabilities are those that its server gives for a prompt.

Run with -s to see what SGLang leaves of weights and scales, and how far log-probabilities lie apart.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA GPU with fp8"
)

PROMPT = [17, 4, 88, 23, 61, 9]
VOCAB = 100
SAMPLES = 1600
NEW_TOKENS = 7
CYCLE = [3, 0, 1, 2, 3]


def make_policies(folder: Path, family: str) -> dict[str, Path]:
    """A and B in bf16."""
    from er_sglang.bench.toy import PolicyShape, make_random_policy

    shape = PolicyShape(hidden=512, intermediate=512, layers=2, heads=4, kv_heads=2, head_dim=128, vocab=VOCAB)
    return {
        name: make_random_policy(folder / f"{name}-bf16", family, shape=shape, seed=seed, dtype=torch.bfloat16)
        for seed, name in enumerate("AB")
    }


def serve(policy: Path, log_path: Path, **args):
    from er_sglang.config import CONFIG_ENV
    from tests.host.servers import HostServer

    common = {
        "skip-tokenizer-init": True,
        "dtype": "bfloat16",
        "random-seed": 20240607,
        "cuda-graph-bs": [1, 8, 32],
        "cuda-graph-backend-prefill": "disabled",
        "max-running-requests": 32,
        "max-total-tokens": 16384,
        "speculative-algorithm": "SELF_QUANT",
        "speculative-num-steps": max(CYCLE),
    }
    plugin = str(Path(__file__).parent / "fp8_plugin")
    env = {
        CONFIG_ENV: json.dumps({"policy": {"mode": "cycle", "cycle": CYCLE}}),
        "PYTHONPATH": os.pathsep.join(filter(None, [plugin, os.environ.get("PYTHONPATH")])),
    }
    return HostServer(policy, {**common, **args}, env=env, log_path=log_path)


class ServedPolicy:
    """The oracle of a server: next-token log-probabilities of its prefill, after each token that follows PROMPT."""

    def __init__(self, server) -> None:
        self._server = server

    def logits(self, sequences_NT: torch.Tensor) -> torch.Tensor:
        n, t = sequences_NT.shape
        request = {
            "input_ids": sequences_NT.tolist(),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            "logprob_start_len": len(PROMPT) - 1,
            "token_ids_logprob": [list(range(VOCAB))] * n,
        }
        logits_NTV = torch.zeros(n, t, VOCAB)
        for row, answer in enumerate(self._server.generate(request)):
            for place, values in enumerate(answer["meta_info"]["input_token_ids_logprobs"][1:], len(PROMPT) - 1):
                logits_NTV[row, place] = torch.tensor([value for value, *_ in values])
        return logits_NTV


def sampled(server, temperature: float = 1.0) -> list[list[int]]:
    from tests.host.oracle import Sampling
    from tests.host.servers import tokens

    params = Sampling(temperature=temperature).params(NEW_TOKENS)
    return tokens(server.generate({"input_ids": [PROMPT] * SAMPLES, "sampling_params": params}))


# -- fp8 weights -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A server of A, and how it becomes B."""

    trainer: object
    bf16: dict[str, Path]
    served: dict[str, Path]

    @property
    def server(self):
        return self.trainer.server


@pytest.fixture(scope="module", params=["blocks", "online"])
def case(request, tmp_path_factory):
    """Checkpoints with scales of blocks, or bf16 ones that are quantized while they are loaded, by the one loader by
    which SGLang can update these. It takes the norms of Qwen3's heads for Linear layers, so that policy is a Qwen2."""
    from tests.host.fp8 import make_fp8_policy
    from tests.host.trainer_client import TrainerClient

    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "blocks":
        bf16, args = make_policies(folder, "qwen3"), {}
        served = {name: make_fp8_policy(policy, folder / name) for name, policy in bf16.items()}
    else:
        bf16, args = make_policies(folder, "qwen2"), {"quantization": "fp8", "load-format": "flash_rl"}
        served = bf16
    with serve(served["A"], folder / "server.log", **args) as server:
        yield Case(trainer=TrainerClient(server), bf16=bf16, served=served)


def assert_exact_and_fresh(server) -> None:
    from tests.host.goodness import assert_exact, cells, is_exact
    from tests.host.oracle import Sampling

    before = server.self_quant()
    outputs = sampled(server)
    state = server.get_server_info()["internal_states"][0]
    assert state["self_quant"]["cycles"] > before["cycles"]
    assert_exact(cells(ServedPolicy(server), PROMPT, outputs, Sampling()))
    assert not is_exact(cells(ServedPolicy(server), PROMPT, outputs, Sampling(temperature=1.1))), "too few samples"
    assert len(state["fresh"]) == 2 * 4 + 1 and all(state["fresh"].values()), state["fresh"]
    drafted, accepted = (state["self_quant"][n] - before[n] for n in ("drafted_tokens", "accepted_tokens"))
    print(f"\naccepted {accepted / drafted:.3f} of {drafted} drafted tokens")
    assert accepted > 0.4 * drafted, "another policy's drafter is right once in a hundred tokens"


def serves(server, case: Case, name: str) -> bool:
    """Whether the server's probabilities are about those of a policy in bf16, and not those of the other one."""
    from tests.host.oracle import Oracle

    sequences_NT = torch.tensor([PROMPT + output for output in sampled(server)[:64]])
    found = ServedPolicy(server).logits(sequences_NT)[:, len(PROMPT) - 1 : -1]
    far = {
        other: (Oracle(path).logits(sequences_NT)[:, len(PROMPT) - 1 : -1].log_softmax(-1) - found).abs().mean().item()
        for other, path in case.bf16.items()
    }
    print(f"\nlog-probabilities lie from those of bf16 policies {far}")
    return far[name] < 0.2 * max(far.values())


def test_served(case) -> None:
    layouts = case.server.get_server_info()["internal_states"][0]["layouts"]
    print("", *(f"{name}: {layout}" for name, layout in layouts.items() if "layers.0" in name), sep="\n")
    assert sum("float8_e4m3fn" in layout for layout in layouts.values()) == 2 * 4
    assert serves(case.server, case, "A")
    assert_exact_and_fresh(case.server)


def test_updated_by_tensor(case) -> None:
    from safetensors.torch import load_file

    before = case.server.get_server_info()["internal_states"][0]
    weights = load_file(case.served["B"] / "model.safetensors")
    scales = {name: tensor for name, tensor in weights.items() if name.endswith("_scale_inv")}
    rest = {name: tensor for name, tensor in weights.items() if name not in scales}
    with case.trainer.paused():
        case.trainer.send_tensors([list(bucket.items()) for bucket in (rest, scales) if bucket], flush_cache=False)
    assert serves(case.server, case, "B")
    assert_exact_and_fresh(case.server)
    after = case.server.get_server_info()["internal_states"][0]
    assert after["policy"] != before["policy"]
    assert after["self_quant"]["refreshes"] == before["self_quant"]["refreshes"] + 1


# -- an fp8 KV cache -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounding(tmp_path_factory):
    """A bf16 policy whose keys and values keep two bits of mantissa."""
    folder = tmp_path_factory.mktemp("kv")
    args = {"attention-backend": "flashinfer", "kv-cache-dtype": "fp8_e5m2"}
    with serve(make_policies(folder, "qwen3")["A"], folder / "server.log", **args) as server:
        yield server


def plainly(server, run):
    server.change_self_quant({"mode": "off"})
    try:
        return run(server)
    finally:
        server.change_self_quant({"mode": "cycle", "cycle": CYCLE})


SHORT_PROMPTS = [[token, VOCAB - 1 - token, 7] for token in range(2, VOCAB - 2)]
Likelihoods = list[tuple[list[int], list[float]]]


def continued(server) -> Likelihoods:
    """Greedy continuations of short prompts, and their tokens' log-probabilities; the first is from the prefill."""
    params = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
    server.empty()
    answers = server.generate({"input_ids": SHORT_PROMPTS, "sampling_params": params, "return_logprob": True})
    return [(a["output_ids"], [v for v, *_ in a["meta_info"]["output_token_logprobs"]]) for a in answers]


def prefilled(server, outputs: list[list[int]]) -> Likelihoods:
    """The same of given continuations by one prefill, which FlashInfer computes of keys and values not yet rounded."""
    server.empty()
    request = {
        "input_ids": [prompt + output for prompt, output in zip(SHORT_PROMPTS, outputs)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": len(SHORT_PROMPTS[0]) - 1,
    }
    answers = server.generate(request)
    return [(o, [v for v, *_ in a["meta_info"]["input_token_logprobs"][1:]]) for o, a in zip(outputs, answers)]


def distance(ours: Likelihoods, theirs: Likelihoods) -> float:
    """Mean distance of log-probabilities for as long as the tokens are the same, but for the first."""
    found = []
    for (tokens_a, a), (tokens_b, b) in zip(ours, theirs):
        same = next((i for i, (x, y) in enumerate(zip(tokens_a, tokens_b)) if x != y), len(tokens_a))
        found += [abs(x - y) for x, y in zip(a[1:same], b[1:same])]
    assert len(found) > 300
    return sum(found) / len(found)


def test_kv_cache_log_probabilities(rounding) -> None:
    """Drafting's are those of plain steps, up to bf16; those of an unrounded cache are others."""
    drafted = continued(rounding)
    assert rounding.self_quant()["drafted_tokens"] > 0
    plain = plainly(rounding, continued)
    unrounded = prefilled(rounding, [output for output, _ in plain])
    ours, control = distance(drafted, plain), distance(unrounded, plain)
    print(f"\nlog-probabilities: drafting to plain {ours:.2g}, unrounded cache to plain {control:.2g}")
    assert ours < 0.3 * control


def test_kv_cache_distribution(rounding) -> None:
    """Tokens at each position, drafting against plain steps, at a false-alarm rate of 1e-4."""
    from tests.host.goodness import FALSE_ALARM

    drafted, plain = sampled(rounding), plainly(rounding, sampled)
    assert smallest_p_value(drafted, plain) >= FALSE_ALARM / NEW_TOKENS
    warmer = plainly(rounding, lambda server: sampled(server, temperature=1.2))
    assert smallest_p_value(drafted, warmer) < FALSE_ALARM / NEW_TOKENS, "too few samples"


def smallest_p_value(ours: list[list[int]], theirs: list[list[int]]) -> float:
    from scipy.stats import chi2_contingency

    p_values = []
    for place in range(NEW_TOKENS):
        counts = torch.stack([torch.tensor(tokens)[:, place].bincount(minlength=VOCAB) for tokens in (ours, theirs)])
        often = counts.sum(0) >= 20
        table = torch.cat([counts[:, often], counts[:, ~often].sum(1, keepdim=True)], dim=1)
        p_values.append(chi2_contingency(table[:, table.sum(0) > 0].numpy()).pvalue)
    return min(p_values)
