"""The tokens with the highest scores, against sorting, and the kernels in Triton's interpreter."""

import pytest
import torch

from er_sglang.drafting.choice import choose_reference
from tests.choice_cases import choice, chosen

CASES = pytest.mark.parametrize(
    ("page_size", "most", "columns"),
    [(1, 40, 3000), (1, 40, 70), (1, 40, 7), (16, 64, 3000), (16, 64, 90), (6, 12, 100)],
)


@CASES
def test_the_best_pages_come_first(page_size, most, columns):
    scores_BC, lengths_B, rows_B, first, last, *_ = arguments = choice("cpu", page_size, most, columns)
    tokens, until = chosen(choose_reference, *arguments)
    for scores, length, row in zip(scores_BC.tolist(), lengths_B.tolist(), rows_B):
        end = max(length - last, 0) // page_size * page_size
        assert until[row] == end
        pages = [range(begin, begin + page_size) for begin in range(first, end, page_size)]
        pages.sort(key=lambda page: -max(scores[position] for position in page))
        best = [position for page in pages for position in page][:most]
        assert tokens[row, : len(best)].tolist() == best
    others = torch.ones(len(tokens), dtype=torch.bool)
    others[rows_B] = False
    assert (tokens[others] == -1).all() and (until[others] == -1).all()


@CASES
@pytest.mark.parametrize("equal", [False, True])
def test_the_kernels_agree_with_the_reference(page_size, most, columns, equal):
    fused = pytest.importorskip("er_sglang.drafting.choice_fused", reason="the kernels are written in Triton")
    arguments = choice("cpu", page_size, most, columns, equal)
    for expected, found in zip(chosen(choose_reference, *arguments), chosen(fused.choose_fused, *arguments)):
        assert torch.equal(expected, found)


def test_scores_that_are_no_numbers_choose_pages_of_the_context():
    fused = pytest.importorskip("er_sglang.drafting.choice_fused", reason="the kernels are written in Triton")
    scores_BC, *arguments = choice("cpu", 1, 40, 300)
    tokens, _ = chosen(fused.choose_fused, scores_BC.fill_(-torch.nan), *arguments)
    rows_B = arguments[1]
    assert all(len({*row}) == 40 and min(row) >= 0 and max(row) < 300 for row in tokens[rows_B].tolist())
