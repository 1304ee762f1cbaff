"""Fused refresh kernels (Triton): read the policy's weight once, write the packed weight in place, nothing between.

Bit-identical to `rtn` followed by `marlin_layout`, which explain what is computed here. Launched without fused
multiply-add and with correctly rounded divisions for that reason.
"""

import torch
import triton
import triton.language as tl

from er_sglang.quantize.scaled import ScaledWeight

BLOCK_N = 64  # one Marlin tile, and one period of the permutations of scales and zeros
BLOCK_K = 128  # 256 bytes of a bf16 row: the largest group, and whole 16-byte loads for half a warp

INVERSE_FP8_MAX = tl.constexpr(1 / 448)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
# Adding 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to nearest even and leaves the integer in its low bits.
ROUND_MAGIC = tl.constexpr(12582912.0)
ROUND_MAGIC_BITS = tl.constexpr(0x4B400000)


def refresh_int4_marlin_(
    weight_NK: torch.Tensor | ScaledWeight,
    codes: torch.Tensor,
    scales_GN: torch.Tensor,
    zeros: torch.Tensor | None,
    *,
    group_size: int,
) -> None:
    """Quantize a contiguous bf16, fp16 or scaled e4m3 weight into Marlin tensors (layouts: `marlin_layout`), in place.

    Symmetric when `zeros` is None. N % 64 == 0, K % 128 == 0, group_size one of 32, 64, 128; blocks of a scaled weight
    are multiples of 128 along K.
    """
    n, k = weight_NK.shape
    weight, weight_scales, (scaled_n, scaled_k) = weight_NK, None, (1, 1)
    if isinstance(weight_NK, ScaledWeight):
        weight, weight_scales, (scaled_n, scaled_k) = weight_NK.codes_NK, weight_NK.scales, weight_NK.block
    _quantize_int4_marlin[(k // BLOCK_K, n // BLOCK_N)](
        weight,
        weight_scales,
        scaled_n,
        scaled_k,
        codes,
        scales_GN,
        zeros,
        n,
        k,
        SYMMETRIC=zeros is None,
        GROUP=group_size,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        enable_fp_fusion=False,
    )


def refresh_fp8_(weight_NK: torch.Tensor, codes_NK: torch.Tensor, scales_N: torch.Tensor) -> None:
    """Quantize a contiguous weight to e4m3 with one float32 scale per row, in place. A row stays in registers."""
    n, k = weight_NK.shape
    block_k = triton.next_power_of_2(k)
    _quantize_fp8[(n,)](
        weight_NK,
        codes_NK,
        scales_N,
        k,
        BLOCK_K=block_k,
        num_warps=min(16, max(1, block_k // 1024)),
        enable_fp_fusion=False,
    )


@triton.jit
def _inverse(scale):
    return tl.where(tl.abs(scale) >= SMALLEST_NORMAL, tl.div_rn(1.0, scale), 0.0)


@triton.jit
def _round_to_int(x):
    return (x + ROUND_MAGIC).to(tl.int32, bitcast=True) - ROUND_MAGIC_BITS


@triton.jit
def _quantize_int4_marlin(
    weight,
    weight_scales,
    scaled_n,
    scaled_k,
    out_codes,
    out_scales,
    out_zeros,
    n,
    k,
    SYMMETRIC: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    TILES: tl.constexpr = BLOCK_K // 16
    k_block = tl.program_id(0)
    n_block = tl.program_id(1)

    rows = tl.arange(0, BLOCK_N)
    cols = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    weight += (n_block * BLOCK_N).to(tl.int64) * k
    # Eight elements a thread, of whatever size: the layout of codes below is made for that.
    offsets = tl.max_contiguous(tl.multiple_of(rows[:, None] * k + cols[None, :], [1, 8]), [1, 8])
    w = tl.load(weight + offsets).to(tl.float32)
    if weight_scales is not None:
        scale_rows = (n_block * BLOCK_N + rows) // scaled_n * tl.cdiv(k, scaled_k)
        w *= tl.load(weight_scales + scale_rows + k_block * BLOCK_K // scaled_k)[:, None]
        w = w.to(out_scales.dtype.element_ty).to(tl.float32)  # the policy's dtype
    w = tl.reshape(w, [BLOCK_N, GROUPS, GROUP])

    high = tl.max(w, 2)
    low = tl.min(w, 2)
    if SYMMETRIC:
        scale = tl.where(high > -low, high, low) * -0.125
    else:
        high = tl.maximum(high, 0.0)
        low = tl.minimum(low, 0.0)
        scale = (high - low) * (1 / 15)
    scale = scale.to(out_scales.dtype.element_ty)
    inverse = _inverse(scale.to(tl.float32))
    levels = _round_to_int(w * inverse[:, :, None])
    groups = k_block * GROUPS + tl.arange(0, GROUPS)
    if SYMMETRIC:
        codes = levels + 8
    else:
        zero = tl.minimum(tl.maximum(_round_to_int(-low * inverse), 0), 15)
        codes = levels + zero[:, :, None]
        # [j, i, G]: nibble 4 (j mod 2) + j div 2 of int32 number i
        j = tl.arange(0, 8)
        zero = tl.reshape(zero, [8, 8, GROUPS]) << (16 * (j % 2) + 4 * (j // 2))[:, None, None]
        tl.store(out_zeros + groups[None, :] * (n // 8) + n_block * 8 + j[:, None], tl.sum(zero, 0))
    codes = tl.minimum(tl.maximum(codes, 0), 15)

    permuted = n_block * BLOCK_N + rows % 8 * 8 + rows // 8
    tl.store(out_scales + groups[None, :] * n + permuted[:, None], scale)

    # [w, h, r, tile, a, c, b]: nibble 4 b + 2 h + a; the eight nibbles of an int32 are summed pair by pair.
    bit = tl.arange(0, 2)
    codes = tl.reshape(codes, [4, 2, 8, TILES, 2, 4, 2])
    codes = tl.sum(codes << (16 * bit), 6)  # b and h lie within a thread, a in the neighbouring lane: a comes last
    codes = tl.sum(codes << (8 * bit)[:, None, None, None, None], 1)
    codes = tl.sum(codes << (4 * bit)[:, None], 3)
    codes = tl.reshape(tl.permute(codes, [2, 1, 3, 0]), [TILES, 128])  # [tile, r, c, w]
    tiles = (k_block * TILES + tl.arange(0, TILES)).to(tl.int64) * (n // 64) + n_block
    tl.store(out_codes + tiles[:, None] * 128 + tl.arange(0, 128)[None, :], codes)


@triton.jit
def _quantize_fp8(weight, out_codes, out_scales, k, BLOCK_K: tl.constexpr):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_K)
    offset = row.to(tl.int64) * k
    w = tl.load(weight + offset + cols, mask=cols < k, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(w), 0) * INVERSE_FP8_MAX
    codes = (w * _inverse(scale)).to(out_codes.dtype.element_ty)
    tl.store(out_codes + offset + cols, codes, mask=cols < k)
    tl.store(out_scales + row, scale)
