"""Where the graphs of a chain find a step."""

from __future__ import annotations

import torch

from er_sglang.cycle.step import Step
from er_sglang.sampling import SamplingParams


class ChainInputs:
    """Buffers for up to ``gamma_max`` drafted tokens of up to ``max_batch`` requests, int64 but for ``params``.

    Step-major, so that each step's slice is contiguous: row i of ``tokens``, ``slots``, ``positions`` and ``seq_lens``
    belongs to step i. ``tokens`` has a row more, for the last token drafted; ``rows``, of the request table, and ``params``
    are of all steps.
    """

    def __init__(self, gamma_max: int, max_batch: int, device: torch.device) -> None:
        def buffer(*shape: int, dtype=torch.int64, fill: float = 0) -> torch.Tensor:
            return torch.full(shape, fill, dtype=dtype, device=device)

        self.tokens = buffer(gamma_max + 1, max_batch)
        self.slots = buffer(gamma_max, max_batch)
        self.positions = buffer(gamma_max, max_batch)
        self.seq_lens = buffer(gamma_max, max_batch, fill=1)
        self.rows = buffer(max_batch)
        self.params = SamplingParams(
            temperature_B=buffer(max_batch, dtype=torch.float32, fill=1),
            top_k_B=buffer(max_batch, dtype=torch.int32, fill=1),
            top_p_B=buffer(max_batch, dtype=torch.float32, fill=1),
            min_p_B=buffer(max_batch, dtype=torch.float32),
            sequential_B=buffer(max_batch, dtype=torch.bool),
        )

    def load(self, step: Step, gamma: int, bs: int, rows_B: torch.Tensor, hidden_B: torch.Tensor | None) -> None:
        """For ``gamma`` tokens. Requests up to ``bs`` that the step has not decode token 0 at position 0 into slot 0, which
        SGLang keeps for padding.

        rows_B: int64, rows of the request table that list what each request's drafts see. hidden_B: int64, how many
        tokens those leave out; None if they list all.
        """
        if self.tokens.is_cuda:
            from er_sglang.cycle.inputs_fused import load_fused

            load_fused(self, step, gamma, bs, rows_B, hidden_B)
        else:
            self.load_reference(step, gamma, bs, rows_B, hidden_B)

    def load_reference(self, step, gamma, bs, rows_B, hidden_B) -> None:
        batch = step.batch_size
        self.tokens[0, :batch] = step.last_B
        self.slots[:gamma, :batch] = step.slots_NB[:gamma]
        self.positions[:gamma, :batch] = step.positions_NB[:gamma]
        self.seq_lens[:gamma, :batch] = step.positions_NB[:gamma] + 1
        if hidden_B is not None:
            self.seq_lens[:gamma, :batch] -= hidden_B
        self.rows[:batch] = rows_B
        for rows, values in zip(self.params, step.params):
            rows[:batch] = values
        for rows in (self.tokens[0], self.slots[:gamma], self.positions[:gamma], self.rows):
            rows[..., batch:bs] = 0
        for rows in (self.seq_lens[:gamma], self.params.top_k_B):
            rows[..., batch:bs] = 1
