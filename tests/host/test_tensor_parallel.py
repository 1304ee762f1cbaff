"""Two tensor-parallel ranks draft, verify and accept the same tokens."""

import os

import pytest

from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Sampling
from tests.host.servers import greedy, self_quant, tokens
from tests.host.test_exactness import PROMPT, sample

CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def server(qwen3, folder):
    config = {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 2]}}
    env = {
        "SGLANG_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}",  # else one rank per NUMA node
        "SGLANG_NCCL_SO_PATH": "/none",  # SGLang tries NCCL wherever it finds the library, on CPU too
    }
    with self_quant(qwen3, folder / "tensor-parallel.log", config, 3, {"tp-size": 2}, env) as server:
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
