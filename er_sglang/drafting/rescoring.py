"""The leading tokens of a quantized lm_head, scored again with the policy's own rows.

Most of what an int4 lm_head costs in acceptance is noise in the few logits that hold nearly all probability. The rows of
these few are a ten-thousandth of lm_head's bytes. Tokens are dealt into CLASSES, token mod CLASSES, so that neighbours are
apart; each class has one leader, its first largest logit; and of the leaders those within MARGIN of the row's largest
are scored again. All others keep the logits of the copy, and drafts stay exact: q is whatever these logits say.
"""

import torch
import torch.nn.functional as F

CLASSES = 64
MARGIN = 6.0  # exp(-6) of the first token's probability


def rescore_(logits_BV: torch.Tensor, hidden_BH: torch.Tensor, weight_VH: torch.Tensor) -> None:
    """Set the leaders of each row to their products with the policy's rows, summed in float32, in place.

    logits: the quantized lm_head's, in any float dtype; hidden and weight in the policy's. On tensor-parallel ranks each
    has its own shard of V, and its own leaders.
    """
    if logits_BV.device.type == "cuda":
        from er_sglang.drafting.rescoring_fused import rescore_fused_

        rescore_fused_(logits_BV, hidden_BH, weight_VH, CLASSES, MARGIN)
    else:
        rescore_reference_(logits_BV, hidden_BH, weight_VH)


def rescore_reference_(logits_BV: torch.Tensor, hidden_BH: torch.Tensor, weight_VH: torch.Tensor) -> None:
    padded_BV = F.pad(logits_BV.float(), (0, -logits_BV.shape[1] % CLASSES), value=-torch.inf)
    best_BC, turn_BC = padded_BV.unflatten(1, (-1, CLASSES)).max(1)
    leads_BC = best_BC >= best_BC.amax(1, keepdim=True) - MARGIN
    row, which = leads_BC.nonzero(as_tuple=True)
    token = turn_BC[row, which] * CLASSES + which
    logits_BV[row, token] = (hidden_BH[row].float() * weight_VH[token].float()).sum(1).to(logits_BV.dtype)
