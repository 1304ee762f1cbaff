"""Round-to-nearest quantizers and their dequantizers, as pure functions on tensors.

They define every format: the fused kernels must agree with them bit for bit. To make that possible, scales are
rounded to the dtype in which they are stored before any code is computed, and all arithmetic is float32 with one
rounding per operation: no fused multiply-add, and no division by constants (torch divides on CPU and multiplies by
the reciprocal on CUDA).

Symmetric int4 scales a group by its extreme weight (the one of largest magnitude, with its sign) over -8, so that
the extreme lands exactly on code 0 = level -8 and the scale, an exponent shift of a weight, is stored exactly.
Mean squared error relative to the weights' variance, group 128, normal weights in bf16:

    |extreme| / 7      0.0138
    |extreme| / 7.5    0.0123
    |extreme| / 8      0.0112   (clips the positive end by a whole step)
    extreme / -8       0.0107   <- used; a per-group search over clipped absmax scales reaches 0.0102
    asymmetric / 15    0.0101

Shapes: N output features, K input features, G = K / group_size groups.
"""

from typing import NamedTuple

import torch

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SYMMETRIC_ZERO = 8  # level = code - 8, in [-8, 7]
SMALLEST_NORMAL = 2.0**-126  # a scale below it has no finite inverse; such weights are zero for any purpose


class Int4(NamedTuple):
    codes_NK: torch.Tensor  # uint8 in [0, 15]
    scales_NG: torch.Tensor  # in the weight's dtype; negative where a symmetric group's extreme is positive
    zeros_NG: torch.Tensor | None  # uint8 in [0, 15]; None when symmetric


class Fp8(NamedTuple):
    codes_NK: torch.Tensor  # float8_e4m3fn
    scales_N: torch.Tensor  # float32


def quantize_int4(weight_NK: torch.Tensor, *, group_size: int, symmetric: bool) -> Int4:
    """4-bit codes with one scale (and one zero point, unless symmetric) per output feature and group of K."""
    w_NGg = weight_NK.float().unflatten(1, (-1, group_size))
    high_NG, low_NG = w_NGg.amax(2), w_NGg.amin(2)
    if symmetric:
        scales_NG = torch.where(high_NG > -low_NG, high_NG, low_NG) * -0.125
    else:
        high_NG, low_NG = high_NG.clamp(min=0), low_NG.clamp(max=0)  # zero must be a level
        scales_NG = (high_NG - low_NG) * (1 / 15)
    scales_NG = scales_NG.to(weight_NK.dtype)
    inverse_NG = _inverse(scales_NG.float())
    zeros_NG = None if symmetric else torch.round(-low_NG * inverse_NG).clamp(0, 15)
    zeros_NG1 = SYMMETRIC_ZERO if symmetric else zeros_NG.unsqueeze(2)
    codes_NGg = torch.round(w_NGg * inverse_NG.unsqueeze(2)).add(zeros_NG1).clamp(0, 15)
    return Int4(codes_NGg.flatten(1).to(torch.uint8), scales_NG, None if symmetric else zeros_NG.to(torch.uint8))


def dequantize_int4(codes_NK: torch.Tensor, scales_NG: torch.Tensor, zeros_NG: torch.Tensor | None) -> torch.Tensor:
    """(code - zero) * scale, rounded once to the scales' dtype, as Marlin does it in registers."""
    codes_NGg = codes_NK.to(torch.int8).unflatten(1, (scales_NG.shape[1], -1))
    zeros_NG1 = SYMMETRIC_ZERO if zeros_NG is None else zeros_NG.to(torch.int8).unsqueeze(2)
    return ((codes_NGg - zeros_NG1).to(scales_NG.dtype) * scales_NG.unsqueeze(2)).flatten(1)


def quantize_fp8(weight_NK: torch.Tensor) -> Fp8:
    """e4m3 codes with one float32 scale per output feature."""
    w_NK = weight_NK.float()
    scales_N = w_NK.abs().amax(1) * (1 / FP8_MAX)
    return Fp8((w_NK * _inverse(scales_N).unsqueeze(1)).to(torch.float8_e4m3fn), scales_N)


def dequantize_fp8(codes_NK: torch.Tensor, scales_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (codes_NK.float() * scales_N.unsqueeze(1)).to(dtype)


def _inverse(scales: torch.Tensor) -> torch.Tensor:
    return torch.where(scales.abs() >= SMALLEST_NORMAL, scales.reciprocal(), 0)
