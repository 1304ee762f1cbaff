"""fp8 on CUDA: e4m3 weights and activations through SGLang's kernel library (CUTLASS scaled matrix product)."""

import torch
from sgl_kernel import fp8_scaled_mm, sgl_per_token_quant_fp8

from er_sglang.quantize.base import Packed
from er_sglang.quantize.kernels import refresh_fp8_
from er_sglang.quantize.reference import ReferenceFp8

DTYPES = (torch.bfloat16, torch.float16)
MAX_K = 32768  # the refresh kernel keeps a row in registers


class ScaledMmFp8(ReferenceFp8):
    """The reference's layout; activations are quantized too, scaled per token, at every call."""

    def unsupported(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"its dtype is {dtype}, fp8 products are written in bfloat16 or float16"
        if n % 16 or k % 16:
            return f"its shape [{n}, {k}] is not a multiple of 16 on both sides"
        if k > MAX_K:
            return f"its {k} input features are more than {MAX_K}"
        return None

    def refresh_(self, packed: Packed, weight_NK: torch.Tensor) -> None:
        refresh_fp8_(weight_NK, packed.codes, packed.scales)

    def apply(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        x_codes_MK = torch.empty_like(x_MK, dtype=torch.float8_e4m3fn)
        x_scales_M1 = x_MK.new_empty(x_MK.shape[0], 1, dtype=torch.float32)
        sgl_per_token_quant_fp8(x_MK, x_codes_MK, x_scales_M1)
        return fp8_scaled_mm(x_codes_MK, packed.codes.t(), x_scales_M1, packed.scales, packed.dtype, bias_N)
