"""An attention window for the drafter: the first tokens of a request and its most recent ones.

In a long context a draft step reads more KV cache than weights. Keys carry their position, so a decode whose request
table lists fewer slots attends to exactly these, on any attention backend; what it misses costs acceptance, never
exactness. The first tokens stay, since attention leans on them (StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

import torch

from er_sglang.config import SINK_TOKENS
from er_sglang.cycle.step import Step


class AttentionWindow:
    """The draft decodes' request table: row b is the b-th request of the step, its columns the KV slots it attends to.

    table: int32 [rows, SINK_TOKENS + recent + gamma_max].
    """

    def __init__(self, recent: int, gamma_max: int, rows: int, device: str | torch.device) -> None:
        """recent: committed tokens that a draft attends to, besides the first SINK_TOKENS and the chain itself."""
        self._most = SINK_TOKENS + recent
        self._columns = torch.arange(self._most + gamma_max, device=device)
        self._after_sinks = (self._columns >= SINK_TOKENS).long()
        self.table = torch.zeros(rows, len(self._columns), dtype=torch.int32, device=device)

    def load(self, step: Step, req_to_token: torch.Tensor, size: int) -> torch.Tensor:
        """Fill the rows of ``step``, and up to ``size`` those of padding, which attends to SGLang's padding slot 0.

        Returns how many tokens of each request they leave out, int64 [B].
        """
        hidden_B = (step.seq_lens_B - self._most).clamp_(min=0)
        positions_BC = self._columns + hidden_B[:, None] * self._after_sinks
        positions_BC.clamp_(max=req_to_token.shape[1] - 1)  # columns beyond the chain, which nobody reads
        self.table[: step.batch_size] = req_to_token[step.req_pool_indices_B[:, None], positions_BC]
        self.table[step.batch_size : size, 0] = 0
        return hidden_B

    def seen_on_host(self, seq_lens_cpu_B: torch.Tensor) -> torch.Tensor:
        """Lengths without what is left out; of upper bounds, upper bounds."""
        return seq_lens_cpu_B.clamp(max=self._most)
