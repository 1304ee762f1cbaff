"""Attention windows for the drafter: which tokens of a long context a draft reads.

In a long context a draft step reads more KV cache than weights. Keys carry their position, so a decode whose row of the
request table lists fewer slots attends to exactly these, on any attention backend and in the graphs of any window; what
it misses costs acceptance, never exactness. A row lists

    by recency      the first SINK_TOKENS, on which attention leans (StreamingLLM, arXiv 2309.17453), and the last ones
    by attention    the first FIRST_TOKENS, those that the latest draft attended to most (attended.py), and the last
                    LAST_TOKENS
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from er_sglang.config import LAST_TOKENS, SINK_TOKENS
from er_sglang.cycle.step import Step

if TYPE_CHECKING:
    from er_sglang.cycle.attended import Attended


def with_window_rows(req_to_token: torch.Tensor, rows: int) -> torch.Tensor:
    """SGLang's request table, int32 [requests, context], and ``rows`` more below, in one new tensor."""
    return torch.cat([req_to_token, req_to_token.new_zeros(rows, req_to_token.shape[1])])


class AttentionWindow:
    """What the drafts of a cycle attend to: ``size`` committed tokens, SINK_TOKENS others, and the chain itself.

    The b-th request of a step has row ``first_row + b`` of the request table, whose columns are the KV slots it sees.
    With pages of several tokens it leaves out whole pages, so that it sees up to a page more. A request of which nobody
    knows yet what it attends to sees its last tokens instead.
    """

    def __init__(
        self,
        size: int,
        gamma_max: int,
        req_to_token: torch.Tensor,
        first_row: int,
        page_size: int,
        attended: Attended | None,
    ) -> None:
        """req_to_token: int32 [rows, context], as ``with_window_rows`` makes it. attended: None for a window by recency."""
        self._attended = attended
        self._page_size = page_size
        if attended is None:
            chosen, self._first, self._last = 0, whole_pages(SINK_TOKENS, page_size), size
        else:
            chosen, self._first, self._last = whole_pages(size, page_size), attended.first, LAST_TOKENS
        self._before = self._first + chosen  # columns
        self._most = self._before + self._last + page_size - 1
        columns = min(self._most + gamma_max, req_to_token.shape[1])
        self._req_to_token = req_to_token
        self._rows = req_to_token[first_row:, :columns]

    def load(self, step: Step) -> torch.Tensor:
        """Fill the rows of ``step``. Returns how many tokens of each request they leave out, int64 [B]."""
        return show(
            self._req_to_token,
            self._rows[: step.batch_size],
            step.req_pool_indices_B,
            step.seq_lens_B,
            self._most,
            self._page_size,
            self._first,
            self._before,
            self._attended and (self._attended.until, self._attended.tokens),
        )

    def seen_on_host(self, seq_lens_cpu_B: torch.Tensor) -> torch.Tensor:
        """Upper bounds of lengths without what is left out, of lengths or their upper bounds."""
        return seq_lens_cpu_B.clamp(max=self._most)


def whole_pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size) * page_size


def show(
    req_to_token: torch.Tensor,
    rows_BC: torch.Tensor,
    requests_B: torch.Tensor,
    lengths_B: torch.Tensor,
    most: int,
    page_size: int,
    first: int,
    before: int,
    chosen: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Fill ``rows_BC`` with slots that ``requests`` have in ``req_to_token``, both int32: those of their ``first`` tokens,
    then those of their last ones, after so many whole pages left out that ``most`` tokens are seen, or up to a page less.
    Returns how many of a request's ``lengths`` tokens are left out, int64 [B].

    chosen: int64 [requests], before which position a request's tokens were chosen, 0 if they were not yet; and these,
    int64 [requests, any number]. Columns from ``first`` to ``before`` are theirs, if there was more to choose from.
    """
    if rows_BC.is_cuda:
        from er_sglang.cycle.window_fused import show_fused

        return show_fused(req_to_token, rows_BC, requests_B, lengths_B, most, page_size, first, before, chosen)
    return show_reference(req_to_token, rows_BC, requests_B, lengths_B, most, page_size, first, before, chosen)


def show_reference(
    req_to_token, rows_BC, requests_B, lengths_B, most, page_size, first, before, chosen
) -> torch.Tensor:
    hidden_B = (lengths_B - most + page_size - 1).clamp_(min=0)
    hidden_B -= hidden_B % page_size
    columns = torch.arange(rows_BC.shape[1], device=rows_BC.device)
    positions_BC = columns + hidden_B[:, None] * (columns >= first)
    if chosen is not None:
        until_B1, tokens_BK = chosen[0][requests_B, None], chosen[1][requests_B]
        chosen_BK = positions_BC[:, first:before]
        chosen_BK.copy_(torch.where(until_B1 >= before, tokens_BK[:, : chosen_BK.shape[1]], chosen_BK))
    positions_BC.clamp_(max=req_to_token.shape[1] - 1)  # columns beyond the chain, which nobody reads
    rows_BC.copy_(req_to_token[requests_B[:, None], positions_BC])
    return hidden_B
