"""How much the queries of one token attend to each token before it, in a few layers that speak for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

ASKED = 4  # layers
Layer = TypeVar("Layer")


def asked(layers: Sequence[Layer]) -> Sequence[Layer]:
    """Up to ASKED of the third quarter: on Qwen2.5-Coder-0.5B what two of these attend to is as good as what all do, and
    better than what as many of any other quarter do."""
    half = len(layers) // 2
    third = layers[half : max(half + half // 2, half + 1)]
    return third[:: -(-len(third) // ASKED)]


def attention_scores(
    queries_SBLHD: torch.Tensor,
    kept_B: torch.Tensor,
    keys: Sequence[torch.Tensor],
    req_to_token: torch.Tensor,
    rows_B: torch.Tensor,
    lengths_B: torch.Tensor,
    columns: int,
    scale: float,
) -> torch.Tensor:
    """softmax(scale * q k^T) over the first ``lengths`` slots of ``rows`` of ``req_to_token``, its mean over L layers and H
    heads: float32 [B, columns], 0 beyond a length.

    queries: of S steps, of B requests or more. A request's are those of the last step that it has ``kept``, int32 [B], at
    least 1, or of the last of all if it has kept more. keys: of each layer, [slots, heads of k, D]. req_to_token int32
    [rows, context]; rows and lengths (at least 1, at most ``columns``) int64.
    """
    if queries_SBLHD.is_cuda:
        from er_sglang.drafting.attention_scores_fused import attention_scores_fused

        return attention_scores_fused(queries_SBLHD, kept_B, keys, req_to_token, rows_B, lengths_B, columns, scale)
    return attention_scores_reference(queries_SBLHD, kept_B, keys, req_to_token, rows_B, lengths_B, columns, scale)


def attention_scores_reference(
    queries_SBLHD, kept_B, keys, req_to_token, rows_B, lengths_B, columns, scale
) -> torch.Tensor:
    steps_B = kept_B.clamp(max=len(queries_SBLHD)).long() - 1
    queries_BLHD = queries_SBLHD[steps_B, torch.arange(len(steps_B), device=steps_B.device)]
    slots_BC = req_to_token[rows_B, :columns].long()
    beyond_BC = torch.arange(columns, device=slots_BC.device) >= lengths_B[:, None]
    total_BC = torch.zeros(slots_BC.shape, device=slots_BC.device)
    for q_BHD, k_SGD in zip(queries_BLHD.unbind(1), keys):
        q_BGRD = q_BHD.float().unflatten(1, (k_SGD.shape[1], -1))
        scores_BGRC = scale * torch.einsum("bgrd,bcgd->bgrc", q_BGRD, k_SGD[slots_BC].float())
        total_BC += scores_BGRC.masked_fill(beyond_BC[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
    return total_BC / len(keys)
