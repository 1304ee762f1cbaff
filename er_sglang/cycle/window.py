"""Attention windows for the drafter: the first tokens of a request and its most recent ones.

In a long context a draft step reads more KV cache than weights. Keys carry their position, so a decode whose row of the
request table lists fewer slots attends to exactly these, on any attention backend and in the graphs of any window; what
it misses costs acceptance, never exactness. The first tokens stay, since attention leans on them (StreamingLLM, arXiv
2309.17453).
"""

from __future__ import annotations

import torch

from er_sglang.config import SINK_TOKENS
from er_sglang.cycle.step import Step


def with_window_rows(req_to_token: torch.Tensor, rows: int) -> torch.Tensor:
    """SGLang's request table, int32 [requests, context], and ``rows`` more below, in one new tensor."""
    return torch.cat([req_to_token, req_to_token.new_zeros(rows, req_to_token.shape[1])])


class AttentionWindow:
    """What the drafts of a cycle attend to: ``recent`` committed tokens, the first ones, and the chain itself.

    The b-th request of a step has row ``first_row + b`` of the request table, whose columns are the KV slots it sees.
    With pages of several tokens it leaves out whole pages, so that it sees up to a page more.
    """

    def __init__(self, recent: int, gamma_max: int, req_to_token: torch.Tensor, first_row: int, page_size: int) -> None:
        """req_to_token: int32 [rows, context], as ``with_window_rows`` makes it."""
        self._page_size = page_size
        sinks = -(-SINK_TOKENS // page_size) * page_size
        self._most = sinks + recent + page_size - 1
        columns = min(self._most + gamma_max, req_to_token.shape[1])
        self._req_to_token = req_to_token
        self._rows = req_to_token[first_row:, :columns]
        self._columns = torch.arange(columns, device=req_to_token.device)
        self._after_sinks = (self._columns >= sinks).long()

    def load(self, step: Step) -> torch.Tensor:
        """Fill the rows of ``step``. Returns how many tokens of each request they leave out, int64 [B]."""
        hidden_B = (step.seq_lens_B - self._most + self._page_size - 1).clamp_(min=0)
        hidden_B -= hidden_B % self._page_size
        positions_BC = self._columns + hidden_B[:, None] * self._after_sinks
        positions_BC.clamp_(max=self._req_to_token.shape[1] - 1)  # columns beyond the chain, which nobody reads
        self._rows[: step.batch_size] = self._req_to_token[step.req_pool_indices_B[:, None], positions_BC]
        return hidden_B

    def seen_on_host(self, seq_lens_cpu_B: torch.Tensor) -> torch.Tensor:
        """Upper bounds of lengths without what is left out, of lengths or their upper bounds."""
        return seq_lens_cpu_B.clamp(max=self._most)
