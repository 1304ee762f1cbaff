"""The formats in plain torch, for CPUs and as the yardstick of the kernels: dequantize, then `F.linear`."""

import torch
import torch.nn.functional as F

from er_sglang.quantize import rtn
from er_sglang.quantize.base import Format, Packed
from er_sglang.quantize.scaled import ScaledWeight


class ReferenceInt4(Format):
    """Codes two to a byte (low nibble = even k) [N, K/2], scales [N, G] in the weight's dtype, zeros uint8 [N, G]."""

    def __init__(self, *, group_size: int, symmetric: bool) -> None:
        if group_size < 2 or group_size % 2:
            raise ValueError(f"group_size must be even and at least 2, not {group_size}: 128 is the usual choice")
        self.group_size = group_size
        self.symmetric = symmetric

    def unsupported(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        if k % self.group_size:
            return f"its {k} input features are not a multiple of the group size {self.group_size}"
        return None

    def allocate(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Packed:
        groups = k // self.group_size
        return Packed(
            n=n,
            k=k,
            dtype=dtype,
            codes=torch.empty(n, k // 2, dtype=torch.uint8, device=device),
            scales=torch.empty(n, groups, dtype=dtype, device=device),
            zeros=None if self.symmetric else torch.empty(n, groups, dtype=torch.uint8, device=device),
        )

    def refresh_(self, packed: Packed, weight_NK: torch.Tensor | ScaledWeight) -> None:
        if isinstance(weight_NK, ScaledWeight):
            weight_NK = weight_NK.dequantize()
        new = rtn.quantize_int4(weight_NK, group_size=self.group_size, symmetric=self.symmetric)
        packed.codes.copy_(new.codes_NK[:, ::2] | new.codes_NK[:, 1::2] << 4)
        packed.scales.copy_(new.scales_NG)
        if packed.zeros is not None:
            packed.zeros.copy_(new.zeros_NG)

    def apply(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x_MK, self.dequantize(packed), bias_N)

    def gates(self, n: int) -> bool:
        return True

    def dequantize(self, packed: Packed) -> torch.Tensor:
        codes_NK = torch.stack((packed.codes & 0xF, packed.codes >> 4), dim=2).flatten(1)
        return rtn.dequantize_int4(codes_NK, packed.scales, packed.zeros)


class ReferenceFp8(Format):
    """e4m3 codes [N, K], float32 scales [N]. Activations are not quantized here."""

    def unsupported(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        return None

    def allocate(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Packed:
        return Packed(
            n=n,
            k=k,
            dtype=dtype,
            codes=torch.empty(n, k, dtype=torch.float8_e4m3fn, device=device),
            scales=torch.empty(n, dtype=torch.float32, device=device),
        )

    def refresh_(self, packed: Packed, weight_NK: torch.Tensor) -> None:
        new = rtn.quantize_fp8(weight_NK)
        packed.codes.copy_(new.codes_NK)
        packed.scales.copy_(new.scales_N)

    def apply(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x_MK, self.dequantize(packed), bias_N)

    def dequantize(self, packed: Packed) -> torch.Tensor:
        return rtn.dequantize_fp8(packed.codes, packed.scales, packed.dtype)
