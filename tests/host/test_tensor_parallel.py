"""Two tensor-parallel ranks draft, verify and accept the same tokens, and agree on what they draft with."""

import pytest

from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Oracle, Sampling
from tests.host.policies import make_policy
from tests.host.servers import BULK, TRAINER, TWO_RANKS, greedy, self_quant, tokens
from tests.host.test_exactness import PROMPT, sample
from tests.host.trainer_client import SLIME, TrainerClient


@pytest.fixture(scope="module")
def server(qwen3, folder):
    config = {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 2]}}
    log, args = folder / "tensor-parallel.log", {"tp-size": 2}
    with self_quant(qwen3, log, config, 3, args, TWO_RANKS, [TRAINER, BULK]) as server:
        yield server


def test_greedy(server, qwen3_oracle):
    prompts = [[5, 6, 7], [12] * 20, [90, 8, 71, 15, 33, 4], [64]]
    outputs = tokens(server.generate({"input_ids": prompts, "sampling_params": greedy(40)}))
    assert outputs == [qwen3_oracle.greedy(prompt, 40) for prompt in prompts]


def test_sampled(server, qwen3_oracle):
    before = server.self_quant()["accepted_tokens"]
    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, top_k=12)):
        assert_exact(cells(qwen3_oracle, PROMPT, sample(server, sampling), sampling))
    assert server.self_quant()["accepted_tokens"] > before


def test_updates(server, folder):
    """One that fails on the second rank alone, of which SGLang hears nothing, then one that arrives."""
    path = make_policy(folder, "qwen3", seed=21)
    trainer = TrainerClient(server)
    server.empty()
    trainer.send_ipc(
        path, "/no/such/policy", **SLIME
    )  # SGLang flushes on the ranks that succeeded, which would part them
    before = server.self_quant()
    server.generate(
        {"input_ids": [PROMPT], "sampling_params": greedy(80)}
    )  # beyond the ranks' next check of each other
    after = server.self_quant()
    assert after["failed_updates"] == 1 and after["drafted_tokens"] == before["drafted_tokens"]

    trainer.send_ipc(path, path)
    outputs = tokens(server.generate({"input_ids": [PROMPT], "sampling_params": greedy(40)}))
    assert outputs == [Oracle(path).greedy(PROMPT, 40)]
    assert server.self_quant()["refreshes"] == 1
    assert server.self_quant()["accepted_tokens"] > after["accepted_tokens"]
