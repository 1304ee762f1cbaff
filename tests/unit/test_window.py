"""The attention window's rows of the request table, against their definition."""

from types import SimpleNamespace

import pytest
import torch

from er_sglang.cycle import window as module
from er_sglang.cycle.step import Step
from er_sglang.cycle.window import LAST_TOKENS, SINK_TOKENS, AttentionWindow, with_window_rows
from er_sglang.sampling import SamplingParams

GAMMA_MAX = 3
REQUESTS, CONTEXT = 9, 200


@pytest.fixture(autouse=True, params=["reference", "kernel"])
def _show(request, monkeypatch):
    """What fills the rows: PyTorch, or the kernel in Triton's interpreter."""
    if request.param == "kernel":
        fused = pytest.importorskip("er_sglang.cycle.window_fused", reason="the kernel is written in Triton")
        monkeypatch.setattr(module, "show", fused.show_fused)


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
    window = AttentionWindow(recent, GAMMA_MAX, table, REQUESTS, page_size, None)
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


def attended(requests: torch.Tensor, until: list[int], most: int, page_size: int) -> SimpleNamespace:
    """In place of `Attended`: ``most`` tokens of each request below ``until``, in any order."""
    first = max(4, page_size)
    generator = torch.Generator().manual_seed(most)
    tokens = torch.zeros(REQUESTS, most, dtype=torch.int64)
    for request, end in zip(requests, until):
        pages = torch.randperm(max(end - first, 0) // page_size, generator=generator)
        found = (first + pages[:, None] * page_size + torch.arange(page_size)).flatten()[:most]
        tokens[request, : len(found)] = found
    return SimpleNamespace(
        first=first,
        tokens=tokens,
        until=torch.zeros(REQUESTS, dtype=torch.int64).index_put((requests,), torch.tensor(until)),
    )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("size", [16, 48])
def test_columns_are_first_tokens_then_chosen_then_recent_ones_then_the_chain(size, page_size):
    table = with_window_rows(torch.randperm(REQUESTS * CONTEXT).view(REQUESTS, CONTEXT).int(), REQUESTS)
    before = table[:REQUESTS].clone()
    lengths = torch.tensor([1, 30, size + LAST_TOKENS, 196, 196, 196, 196, 196])
    ends = lengths - LAST_TOKENS - torch.tensor([0, 0, 0, 0, 2, 20, 40, 500])  # chosen so many tokens ago
    until = [max(0, int(end) // page_size * page_size) for end in ends]
    requests = torch.arange(len(lengths)).flip(0)
    chosen = attended(requests, until, 48, page_size)
    window = AttentionWindow(size, GAMMA_MAX, table, REQUESTS, page_size, chosen)
    hidden = window.load(step(requests, lengths.tolist()))
    bounds = window.seen_on_host(lengths)
    cases = set()
    for b, (request, length, end) in enumerate(zip(requests.tolist(), lengths.tolist(), until)):
        # Of fewer tokens there was no choice.
        middle = chosen.tokens[request, :size].tolist() if end >= chosen.first + size else None
        begin = max(length - LAST_TOKENS, chosen.first + size)
        begin -= (begin - chosen.first - size) % page_size
        cases.add((middle is None, begin == end, begin < length))
        kept = [*range(chosen.first), *(middle or range(begin - size, begin)), *range(begin, max(begin, length))]
        kept = kept[: int(length - hidden[b])]
        assert len(kept) == length - hidden[b] == len({*kept}) <= bounds[b]
        assert length <= LAST_TOKENS or {*range(length - LAST_TOKENS, length)} <= {*kept}
        kept += range(length, length + GAMMA_MAX)
        assert table[REQUESTS + b, : len(kept)].tolist() == before[request, kept].tolist()
        assert all(column % page_size == position % page_size for column, position in enumerate(kept))
    assert len(cases) == 4
    assert torch.equal(table[:REQUESTS], before)


def step(rows, lengths):
    lengths, nothing = torch.tensor(lengths), torch.zeros(len(rows))
    return Step(rows, lengths, lengths, nothing, nothing, nothing, SamplingParams(*[nothing] * 5))
