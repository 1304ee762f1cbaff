"""What the drafter's Linear layers do: a ``quant_method`` for each of their roles."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase
from torch import nn

from er_sglang.drafting.policy_weight import policy_weight
from er_sglang.drafting.rescoring import rescore_
from er_sglang.quantize import Format


class DraftLinearMethod(LinearMethodBase):
    """``quant_method`` of one converted Linear or lm_head: holds and applies its packed weight.

    passes_rows: up to so many rows a fused layer (fused.py) multiplies, and x passes through.
    """

    def __init__(self, fmt: Format, layer: nn.Module) -> None:
        weight_NK = policy_weight(layer)
        self.fmt = fmt
        self.packed = fmt.allocate(*weight_NK.shape, weight_NK.dtype, weight_NK.device)
        self.passes_rows = 0

    def create_weights(self, layer: nn.Module, *args, **kwargs) -> None:
        raise NotImplementedError("a drafter's weights are made from the policy's, never loaded")

    def refresh_(self, layer: nn.Module) -> None:
        """Follow the policy's ``layer``, in place."""
        self.fmt.refresh_(self.packed, policy_weight(layer))

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if 1 <= len(x) <= self.passes_rows:
            return x
        return self._multiply(x, bias)

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.fmt.apply(self.packed, x, bias)


class GatedLinearMethod(DraftLinearMethod):
    """Of a gated MLP's first Linear: the activation behind it is part of the product."""

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.fmt.apply_gated(self.packed, x, bias)


class RescoredHeadMethod(DraftLinearMethod):
    """lm_head's, whose leading tokens are scored again with the policy's rows."""

    def __init__(self, fmt: Format, layer: nn.Module) -> None:
        super().__init__(fmt, layer)
        self._policy_head = layer

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        logits = super()._multiply(x, bias)
        rescore_(logits, x, policy_weight(self._policy_head))
        return logits
