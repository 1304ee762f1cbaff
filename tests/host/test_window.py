"""A drafter with an attention window: what it reads is what the window's rule says, and what is emitted is still the
policy's."""

import random

import pytest
import torch

from er_sglang.config import FIRST_TOKENS, LAST_TOKENS, SINK_TOKENS
from tests.host.goodness import assert_exact, cells
from tests.host.oracle import Sampling
from tests.host.policies import VOCAB
from tests.host.reference_drafter import ReferenceDrafter
from tests.host.servers import BULK, greedy, self_quant, tokens

SIZE = 24
NEW_TOKENS, GAMMA = 9, 2
PROMPT = [random.Random(5).randrange(2, VOCAB) for _ in range(150)]


def serve(policy, folder, rule):
    drafter = {"attention_window": SIZE, "window_by": rule}
    config = {"policy": {"mode": "cycle", "cycle": [3, 1, 0, 2]}, "drafter": drafter}
    args, log = {"disable-overlap-schedule": False}, folder / f"window by {rule}.log"
    return self_quant(policy, log, config, 3, args, plugins=[BULK])


@pytest.fixture(scope="module", params=["recency", "attention"])
def either(qwen3, folder, request):
    with serve(qwen3, folder, request.param) as server:
        yield server, request.param


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_p=0.9)], ids=["T=1", "top_p"])
def test_distribution(either, qwen3_oracle, sampling):
    server, _ = either
    before = server.self_quant()
    answers = server.generate({"input_ids": [PROMPT] * 1200, "sampling_params": sampling.params(8)})
    assert_exact(cells(qwen3_oracle, PROMPT, tokens(answers), sampling))
    assert server.self_quant()["accepted_tokens"] > before["accepted_tokens"]


def test_drafts_are_those_of_the_window(either, qwen3, qwen3_oracle):
    """Of greedy requests, within the window and beyond, as many drafts are accepted as a reference in transformers says:
    the int4 weights on the policy's KV cache, cut to the window."""
    server, rule = either
    rng = random.Random(6)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(SINK_TOKENS - 20 + i)] for i in range(120)]
    outputs = [qwen3_oracle.greedy(prompt, NEW_TOKENS + GAMMA) for prompt in prompts]
    windows = {other: Window(other, SIZE) for other in ("recency", "attention")}
    windows |= {"half": Window(rule, SIZE // 2), "all": Window("recency", 10**6)}
    accepted = {name: count_accepted(qwen3, prompts, outputs, window) for name, window in windows.items()}
    assert len(set(map(tuple, accepted.values()))) == len(windows), "another window would do as well"
    server.change_self_quant({"mode": "always", "fixed_gamma": GAMMA})
    answers = server.generate({"input_ids": prompts, "sampling_params": greedy(NEW_TOKENS)})
    assert tokens(answers) == [output[:NEW_TOKENS] for output in outputs]
    assert [answer["meta_info"]["spec_num_correct_drafts"] for answer in answers] == accepted[rule]


class Window:
    """Which positions drafts at ``length`` read; ``attend`` says how much the latest accepted one attended to each."""

    def __init__(self, rule: str, size: int) -> None:
        self.rule, self.size, self.chosen, self.until = rule, size, [], 0

    def forget(self) -> None:
        self.chosen, self.until = [], 0

    def positions(self, length: int) -> list[int]:
        if self.rule == "recency":
            return sorted({*range(min(SINK_TOKENS, length)), *range(max(length - self.size, 0), length)})
        if self.until < FIRST_TOKENS + self.size:
            begin = max(length - LAST_TOKENS - self.size, FIRST_TOKENS)
            return [*range(min(FIRST_TOKENS, length)), *range(begin, length)]
        return [*range(FIRST_TOKENS), *self.chosen, *range(length - LAST_TOKENS, length)]

    def attend(self, weights_S: torch.Tensor) -> None:
        """weights: of all tokens before the next draft."""
        self.until = max(len(weights_S) - LAST_TOKENS, 0)
        order = weights_S[FIRST_TOKENS : self.until].argsort(descending=True) + FIRST_TOKENS
        self.chosen = order[: self.size].tolist()


def count_accepted(policy, prompts: list[list[int]], outputs: list[list[int]], window: Window) -> list[int]:
    """Of the drafts that are made until NEW_TOKENS of each output are there, those that come next in it."""
    drafter, found = ReferenceDrafter(policy), []
    for prompt, output in zip(prompts, outputs):
        sequence, emitted, accepted = prompt + output, 1, 0
        cache = drafter.cache(sequence)
        window.forget()
        while emitted < NEW_TOKENS:
            length = len(prompt) + emitted - 1
            drafts, queries = drafter.drafts(sequence[length], length, cache, window.positions(length), GAMMA)
            hits = next((i for i, draft in enumerate(drafts) if draft != output[emitted + i]), GAMMA)
            accepted, emitted = accepted + hits, emitted + hits + 1
            window.attend(drafter.attended(queries[min(hits, GAMMA - 1)], length + hits + 1, cache))
        found.append(accepted)
    return found
