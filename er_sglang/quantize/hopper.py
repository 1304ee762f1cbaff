"""int4 products on Hopper for up to 128 rows: launches `small_batch_gemm.cuh` and `wgmma_gemm.cuh`."""

import torch

from er_sglang.quantize.base import Packed
from er_sglang.quantize.blocks import MAX_SPLITS, SMALL_BATCH, Blocks, Waves, choose_blocks, choose_waves
from er_sglang.quantize.modules import small_batch_module, wgmma_module


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


class HopperGemm:
    """y = x @ W_hat.T + bias for up to `blocks.MAX_ROWS` rows. Deterministic; keeps no state between calls."""

    def __init__(self, *, dtype: torch.dtype, symmetric: bool, group_size: int, device: torch.device) -> None:
        wgmma = wgmma_module(dtype, symmetric, group_size)
        self._small_batch = small_batch_module(dtype, symmetric, group_size).gemm
        self._wgmma = wgmma.gemm
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._resident_clusters = tuple(wgmma.resident_clusters(splits) for splits in range(1, MAX_SPLITS + 1))
        self._none = torch.empty(0, dtype=torch.int32, device=device)

    def apply(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None, *, gated: bool) -> torch.Tensor:
        """y [M, N], or [M, N / 2] of a gated product, shared out as is fastest."""
        y_MN = x_MK.new_empty(len(x_MK), packed.n // 2 if gated else packed.n)
        self(packed, x_MK, bias_N, y_MN, self.shape(len(x_MK), packed), gated=gated)
        return y_MN

    def shape(self, m: int, packed: Packed) -> Blocks | Waves:
        """How to share out a product of m rows: blocks of the small-batch kernel, or waves of the wgmma kernel."""
        if m <= SMALL_BATCH:
            return choose_blocks(packed.n, packed.k, self._multiprocessors)
        return choose_waves(packed.n, packed.k, self._resident_clusters)

    def __call__(
        self,
        packed: Packed,
        x_MK: torch.Tensor,
        bias_N: torch.Tensor | None,
        y_MN: torch.Tensor,
        shape: Blocks | Waves,
        *,
        gated: bool = False,
    ) -> None:
        """gated: y is silu(gate) * up, [M, N / 2]; the product's first half is gate, the second up, each rounded."""
        zeros = self._none if packed.zeros is None else packed.zeros
        bias = self._none if bias_N is None else bias_N
        operands = (x_MK, packed.codes, packed.scales, zeros, bias, y_MN, gated)
        if isinstance(shape, Blocks):
            self._small_batch(*operands, *shape)
            return
        begin = 0
        for columns, splits in shape:
            self._wgmma(*operands, begin, columns, splits)
            begin += columns
