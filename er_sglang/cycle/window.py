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
        self._before = self._first + chosen
        self._most = self._before + self._last + page_size - 1
        columns = min(self._most + gamma_max, req_to_token.shape[1])
        self._req_to_token = req_to_token
        self._rows = req_to_token[first_row:, :columns]
        self._columns = torch.arange(columns, device=req_to_token.device)
        self._after_first = (self._columns >= self._first).long()
        self._chosen = slice(self._first, min(self._before, columns))

    def load(self, step: Step) -> torch.Tensor:
        """Fill the rows of ``step``. Returns how many tokens of each request they leave out, int64 [B]."""
        hidden_B = (step.seq_lens_B - self._most + self._page_size - 1).clamp_(min=0)
        hidden_B -= hidden_B % self._page_size
        positions_BC = self._columns + hidden_B[:, None] * self._after_first
        if self._attended is not None:
            until_B, tokens_BK = self._attended.of(step)
            known_B1 = (until_B >= self._before)[:, None]  # there was more to choose from than it takes
            chosen_BK = positions_BC[:, self._chosen]
            chosen_BK.copy_(torch.where(known_B1, tokens_BK[:, : chosen_BK.shape[1]], chosen_BK))
        positions_BC.clamp_(max=self._req_to_token.shape[1] - 1)  # columns beyond the chain, which nobody reads
        self._rows[: step.batch_size] = self._req_to_token[step.req_pool_indices_B[:, None], positions_BC]
        return hidden_B

    def seen_on_host(self, seq_lens_cpu_B: torch.Tensor) -> torch.Tensor:
        """Upper bounds of lengths without what is left out, of lengths or their upper bounds."""
        return seq_lens_cpu_B.clamp(max=self._most)


def whole_pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size) * page_size
