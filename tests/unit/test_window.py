"""The attention window's rows of the request table, against their definition."""

import pytest
import torch

from er_sglang.cycle.step import Step
from er_sglang.cycle.window import SINK_TOKENS, AttentionWindow, with_window_rows
from er_sglang.sampling import SamplingParams

GAMMA_MAX = 3
REQUESTS, CONTEXT = 9, 200


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("recent", [1, 7, 100, 10**6])
def test_columns_are_sinks_then_recent_tokens_then_the_chain(recent, page_size):
    generator = torch.Generator().manual_seed(recent)
    table = with_window_rows(torch.randperm(REQUESTS * CONTEXT, generator=generator).view(REQUESTS, CONTEXT).int(), 8)
    before = table[:REQUESTS].clone()
    table[REQUESTS:] = -1
    sinks = max(SINK_TOKENS, page_size)
    beyond = {min(sinks + min(recent, CONTEXT) + i, CONTEXT - GAMMA_MAX) for i in (0, 1, page_size - 1, page_size)}
    lengths = [1, 5, SINK_TOKENS, *sorted(beyond)]
    requests = torch.randperm(REQUESTS, generator=generator)[: len(lengths)]
    window = AttentionWindow(recent, GAMMA_MAX, table, REQUESTS, page_size)
    hidden = window.load(step(requests, lengths))
    bounds = window.seen_on_host(torch.tensor(lengths))
    for b, (request, length) in enumerate(zip(requests.tolist(), lengths)):
        first = max(0, length - recent)
        first -= (first - sinks) % page_size if first > sinks else 0  # a page is seen as a whole
        kept = sorted({*range(min(sinks, length)), *range(first, length)})
        assert length - hidden[b] == len(kept) <= bounds[b]
        kept += range(length, length + GAMMA_MAX)
        assert table[REQUESTS + b, : len(kept)].tolist() == before[request, kept].tolist()
        # Attention reads whole pages: a column is at the same place of its page as the token that it stands for.
        assert all(column % page_size == position % page_size for column, position in enumerate(kept))
    assert torch.equal(table[:REQUESTS], before)
    assert torch.all(table[REQUESTS + len(lengths) :] == -1)


def step(rows, lengths):
    lengths, nothing = torch.tensor(lengths), torch.zeros(len(rows))
    return Step(rows, lengths, lengths, nothing, nothing, SamplingParams(*[nothing] * 5))
