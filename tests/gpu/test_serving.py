"""The real server on one GPU, on two, and with an attention window; head_dim 128, bf16, overlap scheduling. Graphs
equal eager runs bit for bit, and the emitted distribution is the policy's (false-alarm rate 1e-4 a test; filters are
tested on the sampler itself, since bf16 rounding moves tokens across a filter's edge)."""

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


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    from er_sglang.bench.toy import PolicyShape, make_random_policy

    shape = PolicyShape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=2, head_dim=128, vocab=100)
    return make_random_policy(tmp_path_factory.mktemp("policy") / "qwen3", "qwen3", shape=shape, dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (1, 8)], ids=["tp1", "tp2", "window"])
def server(policy, tmp_path_factory, request):
    gpus, attention_window = request.param
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    from er_sglang.config import CONFIG_ENV
    from er_sglang.tools.serving import Server

    plugin = str(Path(__file__).parent / "plugin")
    args = {
        "skip-tokenizer-init": True,
        "dtype": "bfloat16",
        "random-seed": 20240607,
        "cuda-graph-bs": [1, 8, LARGEST_GRAPH_BATCH],
        "cuda-graph-backend-prefill": "disabled",
        "max-running-requests": 64,
        "mem-fraction-static": 0.3,
        "tp-size": gpus,
        "speculative-algorithm": "SELF_QUANT",
        "speculative-num-steps": 3,
    }
    env = {
        CONFIG_ENV: json.dumps(
            {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 2, 3]}, "drafter": {"attention_window": attention_window}}
        ),
        "PYTHONPATH": os.pathsep.join(filter(None, [plugin, os.environ.get("PYTHONPATH")])),
    }
    with Server(policy, args, env=env, log_path=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


@pytest.mark.parametrize("check, per_batch", [("GRAPH_CHECK", 2 * 3), ("TWIN_CHECK", 3)])
def test_graphs_equal_eager_runs_and_twins_their_originals(server, check, per_batch) -> None:
    """The plugin compares them at start-up and stops the server at the first difference: draft and verify of gamma 1 to 3;
    logits, keys and values of a token drafted without the twins of small modules."""
    from er_sglang.worker import GRAPH_BATCHES

    batches = [batch for batch in GRAPH_BATCHES if batch <= LARGEST_GRAPH_BATCH]
    checks = [line for line in server.log_path.read_text().splitlines() if line.startswith(check)]
    assert len(checks) == server.get_server_info()["tp_size"] * per_batch * len(batches)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
def test_distribution(server, policy, temperature) -> None:
    from tests.host.goodness import assert_exact, cells
    from tests.host.oracle import Oracle, Sampling

    sampling = Sampling(temperature=temperature)
    before = server.get_server_info()["internal_states"][0]["self_quant"]
    answers = server.generate({"input_ids": [PROMPT] * SAMPLES, "sampling_params": sampling.params(NEW_TOKENS)})
    after = server.get_server_info()["internal_states"][0]["self_quant"]
    assert_exact(cells(Oracle(policy), PROMPT, [answer["output_ids"] for answer in answers], sampling))
    assert after["cycles"] > before["cycles"] and after["decode_steps"] > before["decode_steps"]


def test_wrong_distribution_fails(server, policy) -> None:
    """The same check of the same answers, against a temperature a tenth off."""
    from tests.host.goodness import cells, is_exact
    from tests.host.oracle import Oracle, Sampling

    answers = server.generate({"input_ids": [PROMPT] * SAMPLES, "sampling_params": Sampling().params(NEW_TOKENS)})
    assert not is_exact(
        cells(Oracle(policy), PROMPT, [answer["output_ids"] for answer in answers], Sampling(temperature=1.1))
    )


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
