"""int4 products for the few rows of a draft step on Hopper: loads and launches `small_batch_gemm.cuh`."""

from pathlib import Path

import torch
from sglang.jit_kernel.utils import cache_once, load_jit, make_cpp_args

from er_sglang.quantize.base import Packed
from er_sglang.quantize.blocks import Blocks, choose_blocks


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
    """y = x @ W_hat.T + bias for few rows. Deterministic; keeps no state between calls."""

    def __init__(self, *, dtype: torch.dtype, symmetric: bool, group_size: int, device: torch.device) -> None:
        self._gemm = _module(dtype, symmetric, group_size).gemm
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._none = torch.empty(0, dtype=torch.int32, device=device)

    def blocks(self, m: int, packed: Packed) -> Blocks | None:
        """How to share out a product of m rows; None where Marlin is faster."""
        return choose_blocks(m, packed.n, packed.k, self._multiprocessors)

    def __call__(
        self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None, y_MN: torch.Tensor, blocks: Blocks
    ) -> None:
        zeros = self._none if packed.zeros is None else packed.zeros
        bias = self._none if bias_N is None else bias_N
        self._gemm(x_MK, packed.codes, packed.scales, zeros, bias, y_MN, *blocks)
