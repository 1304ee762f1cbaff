"""Where the tokens of a step go."""

from __future__ import annotations

import torch


def next_slots(
    req_to_token: torch.Tensor, rows_B: torch.Tensor, lengths_B: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each request the ``width`` positions after its first ``lengths``, and their KV slots: int64 [width, B], both
    request-major in memory.

    req_to_token int32 [rows, context]; rows and lengths int64.
    """
    if lengths_B.is_cuda:
        from er_sglang.cycle.slots_fused import next_slots_fused

        return next_slots_fused(req_to_token, rows_B, lengths_B, width)
    return next_slots_reference(req_to_token, rows_B, lengths_B, width)


def next_slots_reference(req_to_token, rows_B, lengths_B, width) -> tuple[torch.Tensor, torch.Tensor]:
    positions_BN = lengths_B[:, None] + torch.arange(width, device=lengths_B.device)
    return positions_BN.t(), req_to_token[rows_B[:, None], positions_BN].long().t()
