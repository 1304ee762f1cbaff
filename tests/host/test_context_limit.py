"""Requests that run to the context limit, with the longest drafts: their last cycles reach beyond it."""

import random

import pytest

from tests.host.oracle import Oracle
from tests.host.policies import VOCAB, make_policy
from tests.host.servers import greedy, self_quant, tokens

CONTEXT_TOKENS = 128
GAMMA = 15


@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "no overlap"])
def test_requests_that_fill_the_context(folder, overlap):
    policy = make_policy(folder, "llama", seed=4, max_positions=CONTEXT_TOKENS)
    oracle, rng = Oracle(policy), random.Random(8)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(length)] for length in (3, 20, 61, 100)]
    wanted = [CONTEXT_TOKENS - len(prompt) for prompt in prompts]
    config = {"policy": {"mode": "cycle", "cycle": [GAMMA, 0, GAMMA, GAMMA]}}
    log = folder / f"context-limit-{overlap}.log"
    with self_quant(policy, log, config, GAMMA, {"disable-overlap-schedule": not overlap}) as server:
        answers = tokens(server.generate({"input_ids": prompts, "sampling_params": [greedy(n) for n in wanted]}))
        server.empty()  # an idle SGLang checks that no KV slot has leaked
        assert server.process.poll() is None
    for prompt, answer in zip(prompts, answers):
        assert len(prompt) + len(answer) >= CONTEXT_TOKENS - 4, "SGLang stops a request just before the limit"
        assert answer == oracle.greedy(prompt, len(answer))
