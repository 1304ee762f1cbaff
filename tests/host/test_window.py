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


@pytest.fixture(
    scope="module",
    params=[("recency", 1), ("attention", 1), ("attention", 4)],
    ids=["recency", "attention", "attention, pages"],
)
def served(qwen3, folder, request):
    """A server, the rule of its window and the tokens of a page."""
    rule, page = request.param
    config = {
        "policy": {"mode": "cycle", "cycle": [3, 1, 0, 2]},
        "drafter": {"attention_window": SIZE, "window_by": rule},
    }
    args, log = {"disable-overlap-schedule": False, "page-size": page}, folder / f"window by {rule}, {page}.log"
    with self_quant(qwen3, log, config, 3, args, plugins=[BULK]) as server:
        yield server, rule, page


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.6, top_p=0.9)], ids=["T=1", "top_p"])
def test_distribution(served, qwen3_oracle, sampling):
    server, *_ = served
    before = server.self_quant()
    answers = server.generate({"input_ids": [PROMPT] * 1200, "sampling_params": sampling.params(8)})
    assert_exact(cells(qwen3_oracle, PROMPT, tokens(answers), sampling))
    assert server.self_quant()["accepted_tokens"] > before["accepted_tokens"]


def test_drafts_are_those_of_the_window(served, qwen3, qwen3_oracle):
    """Of greedy requests, within the window and beyond, as many drafts are accepted as a reference in transformers says:
    the int4 weights on the policy's KV cache, cut to the window."""
    server, rule, page = served
    rng = random.Random(6)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(SINK_TOKENS - 20 + i)] for i in range(90)]
    outputs = [qwen3_oracle.greedy(prompt, NEW_TOKENS + GAMMA) for prompt in prompts]
    windows = {other: Window(other, SIZE, page) for other in ("recency", "attention")}
    windows |= {"half": Window(rule, SIZE // 2, page), "all": Window("recency", 10**6, page)}
    accepted = {name: count_accepted(qwen3, prompts, outputs, window) for name, window in windows.items()}
    assert len(set(map(tuple, accepted.values()))) == len(windows), "another window would do as well"
    server.change_self_quant({"mode": "always", "fixed_gamma": GAMMA})
    answers = server.generate({"input_ids": prompts, "sampling_params": greedy(NEW_TOKENS)})
    assert tokens(answers) == [output[:NEW_TOKENS] for output in outputs]
    assert [answer["meta_info"]["spec_num_correct_drafts"] for answer in answers] == accepted[rule]


class Window:
    """Which positions drafts at ``length`` read, the first tokens and the last pages; between them, if the rule is attention,
    the pages with the largest of the weights that ``attend`` is given."""

    def __init__(self, rule: str, size: int, page: int) -> None:
        self.size, self.page = size, page
        self.first, self.last = (SINK_TOKENS, size) if rule == "recency" else (FIRST_TOKENS, LAST_TOKENS)
        self.by_attention = rule == "attention"
        self.forget()

    def forget(self) -> None:
        self.chosen = []

    def positions(self, length: int) -> list[int]:
        last = self.last + (self.size if self.by_attention and not self.chosen else 0)
        begin = max(length - last, self.first) // self.page * self.page
        return [*range(min(self.first, length)), *self.chosen, *range(begin, length)]

    def attend(self, weights_S: torch.Tensor) -> None:
        """weights: of all tokens before the next draft."""
        until = (len(weights_S) - LAST_TOKENS) // self.page * self.page
        if self.by_attention and until >= self.first + self.size:
            pages = weights_S[self.first : until].unflatten(0, (-1, self.page)).amax(1).argsort(descending=True)
            tokens = self.first + pages[: self.size // self.page, None] * self.page + torch.arange(self.page)
            self.chosen = tokens.flatten().tolist()


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
