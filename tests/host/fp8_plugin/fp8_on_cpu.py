"""SGLang plugin for tests: fp8 policies on a CPU without AMX, where SGLang has no products of fp8 weights.

Weights are loaded and processed by SGLang; a product is that of codes times scales in float32, and activations are not
quantized. So transformers can say what such a policy must emit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 128


def activate() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod

    Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: [torch.float32])
    Fp8LinearMethod.process_weights_after_loading_block_quant = lambda self, layer: None  # packs for AMX
    Fp8LinearMethod.apply = _apply


def _apply(self, layer, x, bias=None):
    if self.block_quant:
        scale = layer.weight_scale_inv.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return F.linear(x, layer.weight.float() * scale, bias)
    return F.linear(x, layer.weight.t().float() * layer.weight_scale, bias)
