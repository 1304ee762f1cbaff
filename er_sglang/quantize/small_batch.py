"""int4 products for the few rows of a draft step on Hopper and newer: loads and launches `small_batch_gemm.cuh`."""

from pathlib import Path
from typing import NamedTuple

import torch
from sglang.jit_kernel.utils import cache_once, load_jit, make_cpp_args

from er_sglang.quantize.base import Packed

MAX_M = 16  # rows; above it Marlin is as fast
UNIT_K = 128  # of K, what a warp multiplies at a time
TILE_N = 64  # of N, likewise


class Blocks(NamedTuple):
    """How the warps of the chip share a product: `warps_n` x `warps_k` a block, `splits` blocks share the columns of K."""

    warps_n: int
    warps_k: int
    splits: int


def choose_blocks(m: int, n: int, k: int, sm_count: int) -> Blocks:
    """The shape that fills the chip best with blocks that all run at once, each warp with about two units of K or more.

    The blocks of a cluster share a part of the chip (GPC, 16 or 18 multiprocessors): 3, 6 and 7 of them pack badly, and
    the last tenth of the chip cannot be counted on.
    """
    # Wide blocks read x less often and come first; narrow ones fill the chip where those leave a gap.
    resident = {(4, 2): 2, (2, 4): 2, (4, 1): 5} if m <= 8 else {(4, 2): 1, (2, 4): 1, (4, 1): 3}
    best, best_fill = Blocks(4, 2, 1), 0.0
    for (warps_n, warps_k), per_sm in resident.items():
        columns = -(-n // (TILE_N * warps_n))
        for splits in (1, 2, 4, 5, 8):
            fill = columns * splits / (per_sm * sm_count)
            if best_fill + 0.02 < fill <= 0.9 and k // UNIT_K >= 1.7 * splits * warps_k:
                best, best_fill = Blocks(warps_n, warps_k, splits), fill
    return best


@cache_once
def _module(dtype: torch.dtype, symmetric: bool, group_size: int):
    args = make_cpp_args(dtype, symmetric, group_size)
    return load_jit(
        "er_sglang_small_batch_gemm",
        *args,
        cuda_files=[str(Path(__file__).with_name("small_batch_gemm.cuh"))],
        cuda_wrappers=[("gemm", f"er_sglang::SmallBatchGemm<{args}>::run")],
    )


class SmallBatchGemm:
    """y = x @ W_hat.T + bias for up to MAX_M rows. Deterministic; keeps no state between calls."""

    def __init__(self, *, dtype: torch.dtype, symmetric: bool, group_size: int, device: torch.device) -> None:
        self._gemm = _module(dtype, symmetric, group_size).gemm
        self._sm_count = torch.cuda.get_device_properties(device).multi_processor_count
        self._none = torch.empty(0, dtype=torch.int32, device=device)

    def __call__(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None, y_MN: torch.Tensor) -> None:
        zeros = self._none if packed.zeros is None else packed.zeros
        bias = self._none if bias_N is None else bias_N
        blocks = choose_blocks(len(x_MK), packed.n, packed.k, self._sm_count)
        self._gemm(x_MK, packed.codes, packed.scales, zeros, bias, y_MN, *blocks)
