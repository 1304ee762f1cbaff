"""The weight of a policy's Linear or lm_head, wherever SGLang left it once it was loaded."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
from torch import nn

from er_sglang.quantize.scaled import ScaledWeight


def policy_weight(layer: nn.Module) -> torch.Tensor | ScaledWeight:
    """[N, K], contiguous, in place; call it only where ``unreadable`` is None, and anew after every update.

    What Fp8LinearMethod leaves of an fp8 weight:

    a checkpoint with scales of blocks    weight [N, K], weight_scale_inv [ceil(N / block_n), ceil(K / block_k)]
    quantized while it is loaded, or a    weight [K, N], a transposed view; weight_scale with N elements, or with one
    checkpoint with scales of tensors     where there is no CUTLASS
    """
    weight, method = layer.weight.data, layer.quant_method
    if not isinstance(method, Fp8LinearMethod):
        return weight
    if method.block_quant:
        block = tuple(method.quant_config.weight_block_size)
        return ScaledWeight(weight, layer.weight_scale_inv.data, block, layer.orig_dtype)
    weight_NK, scales = weight.t(), layer.weight_scale.data.view(-1, 1)
    n, k = weight_NK.shape
    return ScaledWeight(weight_NK, scales, (n // len(scales), k), layer.orig_dtype)


def unreadable(layer: nn.Module) -> str | None:
    """Why ``policy_weight`` cannot tell this layer's weight, None if it can."""
    method = layer.quant_method
    if isinstance(method, (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)):
        return None
    if type(method) is not Fp8LinearMethod:
        return f"weight is handled by {type(method).__name__}"
    if layer.weight.dtype != torch.float8_e4m3fn:
        return "its fp8 weight is repacked for Marlin: serve the policy in bf16 on this card"
    scales = layer.weight_scale_inv if method.block_quant else layer.weight_scale
    if scales.dtype != torch.float32:
        return "its scales are packed for DeepGEMM: add --fp8-gemm-backend triton"
    return None
