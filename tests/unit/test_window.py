"""The attention window's table, against its definition."""

import pytest
import torch

from er_sglang.cycle.step import Step
from er_sglang.cycle.window import SINK_TOKENS, AttentionWindow
from er_sglang.errors import ConfigError
from er_sglang.host.refusals import check_pages
from er_sglang.sampling import SamplingParams

GAMMA_MAX = 3
REQUESTS, CONTEXT = 9, 200


@pytest.mark.parametrize("recent", [1, 7, 100])
def test_columns_are_sinks_then_recent_tokens_then_the_chain(recent):
    generator = torch.Generator().manual_seed(recent)
    req_to_token = torch.randperm(REQUESTS * CONTEXT, generator=generator).view(REQUESTS, CONTEXT).int()
    lengths = [1, 5, SINK_TOKENS, SINK_TOKENS + recent, SINK_TOKENS + recent + 1, CONTEXT - GAMMA_MAX]
    rows = torch.randperm(REQUESTS, generator=generator)[: len(lengths)]
    window = AttentionWindow(recent, GAMMA_MAX, REQUESTS, torch.device("cpu"))
    window.table.fill_(-1)
    hidden = window.load(step(rows, lengths), req_to_token, len(lengths) + 2)
    seen = window.seen_on_host(torch.tensor(lengths))
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths)):
        kept = sorted({*range(min(SINK_TOKENS, length)), *range(max(0, length - recent), length)})
        kept += range(length, length + GAMMA_MAX)
        assert window.table[b, : len(kept)].tolist() == req_to_token[row, kept].tolist()
        assert length - hidden[b] == seen[b] == len(kept) - GAMMA_MAX
    assert window.table[len(lengths) :, 0].tolist() == [0, 0, -1]  # two of padding, and one that the step has not


def test_a_window_needs_pages_of_one_token():
    check_pages(page_size=1, attention_window=8)
    check_pages(page_size=16, attention_window=0)
    with pytest.raises(ConfigError, match="not 16: set --page-size 1"):
        check_pages(page_size=16, attention_window=8)


def step(rows, lengths):
    lengths, nothing = torch.tensor(lengths), torch.zeros(len(rows))
    return Step(rows, lengths, lengths, nothing, nothing, SamplingParams(nothing, nothing, nothing, nothing))
