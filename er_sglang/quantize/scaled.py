"""A policy's weight in fp8, as the formats read it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ScaledWeight:
    """An e4m3 weight [N, K] and the scales of its blocks.

    The weight it stands for is code * scale, a float32 product rounded to ``dtype``.
    """

    codes_NK: torch.Tensor  # float8_e4m3fn, contiguous
    scales: torch.Tensor  # float32, contiguous, [ceil(N / block_n), ceil(K / block_k)]
    block: tuple[int, int]  # block_n, block_k: (1, K) is a scale per output feature, (N, K) one per tensor
    dtype: torch.dtype  # of activations and output

    @property
    def shape(self) -> torch.Size:
        return self.codes_NK.shape

    @property
    def device(self) -> torch.device:
        return self.codes_NK.device

    def dequantize(self) -> torch.Tensor:
        """The weight [N, K] in ``dtype``: what the fused kernels compute in registers."""
        (n, k), (block_n, block_k) = self.shape, self.block
        scales_NK = self.scales.repeat_interleave(block_n, 0)[:n].repeat_interleave(block_k, 1)[:, :k]
        return (self.codes_NK.float() * scales_NK).to(self.dtype)
