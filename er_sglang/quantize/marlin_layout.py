"""The memory layout that Marlin kernels read, in plain torch: the specification of the fused refresh kernel.

Source: `gptq_marlin_repack_kernel` in SGLang's jit_kernel/csrc/gemm/marlin/gptq_marlin_repack.cuh, and
`marlin_permute_scales` and `marlin_zero_points` in its layers/quantization/marlin_utils.py.

Codes are tiled 64 (N) x 16 (K). A tile is 128 int32, tiles of one row of K lie side by side: int32 [K/16, 2N].
Inside a tile write

    n = 16 w + 8 h + r      w in 0..3 (warp), h in 0..1, r in 0..7
    k =  8 a + 2 c + b      a in 0..1, c in 0..3, b in 0..1

then the code of (n, k) is nibble 4 b + 2 h + a (0 is the lowest) of int32 number 16 r + 4 c + w of the tile:
lane 4 r + c of a warp finds the operands of four tensor-core tiles in one 16-byte load.

Scales [K/g, N] and zero points are permuted within 64 consecutive n = 8 j + i: scale n moves to 8 i + j;
zero points are packed, n becoming nibble 4 (j mod 2) + j div 2 of int32 number i: int32 [K/g, N/8].
This holds for two or more groups along K; Marlin permutes a single group differently, which we do not use.
"""

import torch

TILE_N = 64
TILE_K = 16


def pack_codes(codes_NK: torch.Tensor) -> torch.Tensor:
    """uint8 codes [N, K] in [0, 15] -> int32 [K/16, 2N]."""
    n, k = codes_NK.shape
    tiles = codes_NK.reshape(n // TILE_N, 4, 2, 8, k // TILE_K, 2, 4, 2)  # N tile, w, h, r, K tile, a, c, b
    nibbles = tiles.permute(4, 0, 3, 6, 1, 7, 2, 5)  # K tile, N tile, r, c, w, b, h, a
    return _pack_nibbles(nibbles.reshape(k // TILE_K, 2 * n, 8))


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """int32 [K/16, 2N] -> uint8 codes [N, K]."""
    k, n = packed.shape[0] * TILE_K, packed.shape[1] // 2
    nibbles = _unpack_nibbles(packed).reshape(k // TILE_K, n // TILE_N, 8, 4, 4, 2, 2, 2)
    return nibbles.permute(1, 4, 6, 2, 0, 7, 3, 5).reshape(n, k)


def pack_scales(scales_NG: torch.Tensor) -> torch.Tensor:
    """Scales [N, G] -> [G, N], permuted."""
    n, groups = scales_NG.shape
    return scales_NG.T.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n)


def unpack_scales(packed_GN: torch.Tensor) -> torch.Tensor:
    """Permuted scales [G, N] -> [N, G]."""
    groups, n = packed_GN.shape
    return packed_GN.reshape(groups, n // 64, 8, 8).transpose(2, 3).reshape(groups, n).T


def pack_zeros(zeros_NG: torch.Tensor) -> torch.Tensor:
    """uint8 zero points [N, G] in [0, 15] -> int32 [G, N/8]."""
    n, groups = zeros_NG.shape
    j_high_low = zeros_NG.T.reshape(groups, n // 64, 4, 2, 8)  # j div 2, j mod 2, i
    return _pack_nibbles(j_high_low.permute(0, 1, 4, 3, 2).reshape(groups, n // 8, 8))


def unpack_zeros(packed: torch.Tensor) -> torch.Tensor:
    """int32 [G, N/8] -> uint8 zero points [N, G]."""
    groups, n = packed.shape[0], packed.shape[1] * 8
    nibbles = _unpack_nibbles(packed).reshape(groups, n // 64, 8, 2, 4)
    return nibbles.permute(0, 1, 4, 3, 2).reshape(groups, n).T


def _shifts(device: torch.device) -> torch.Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=device)


def _pack_nibbles(nibbles: torch.Tensor) -> torch.Tensor:
    # The nibbles occupy disjoint bits, so a sum that wraps modulo 2**32 is their union.
    return (nibbles.to(torch.int32) << _shifts(nibbles.device)).sum(-1, dtype=torch.int32)


def _unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return (packed.unsqueeze(-1) >> _shifts(packed.device) & 0xF).to(torch.uint8)
