"""What a weight format is: allocate once, refresh in place, apply."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from er_sglang.quantize.scaled import ScaledWeight


@dataclass(slots=True)
class Packed:
    """One quantized weight W_hat [n, k]: all the memory it owns.

    Layout and dtypes of the tensors are the format's; only the format that allocated a Packed may read it.
    """

    n: int
    k: int
    dtype: torch.dtype  # of the policy's weight, the activations and the output
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None  # int4_asym only

    def tensors(self) -> dict[str, torch.Tensor]:
        named = {"codes": self.codes, "scales": self.scales, "zeros": self.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


class LayerProducts(NamedTuple):
    """Weights of a decoder layer from o on, of the following layer's qkv, and of the two that are multiplied by after it."""

    o: Packed
    gate_up: Packed
    down: Packed
    qkv: Packed
    next_o: Packed
    next_gate_up: Packed


class LayerNorms(NamedTuple):
    """Weights of a layer's norm behind the attention, and of the following layer's before it."""

    first_H: torch.Tensor
    second_H: torch.Tensor
    eps: float


class Format(ABC):
    """A weight format on one device. Make one with `create_format`.

    `refresh_` and `apply` never move a tensor of a Packed, so CUDA graphs that captured `apply` survive refreshes.
    All weights of a Format share its workspace: run its `apply` calls on one stream at a time.
    """

    @abstractmethod
    def unsupported(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        """Why a weight [n, k] of this dtype cannot be converted, or None when it can."""

    @abstractmethod
    def allocate(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Packed:
        """Memory for one weight, uninitialised until the first `refresh_`. Call only where `unsupported` is None."""

    @abstractmethod
    def refresh_(self, packed: Packed, weight_NK: torch.Tensor | ScaledWeight) -> None:
        """Re-derive `packed` from the contiguous weight [n, k], in place, at the same addresses.

        int4 formats alone read a ScaledWeight: of an fp8 policy an fp8 copy saves nothing.
        """

    @abstractmethod
    def apply(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """y_MN = x_MK @ W_hat.T + bias, in the weight's dtype."""

    def gates(self, n: int) -> bool:
        """Whether a drafter should call `apply_gated` for a gated MLP's first weight, of n output features."""
        return False

    def apply_gated(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        """silu(gate) * up [M, N/2] of the halves of `apply`'s y: computed in float32, rounded as y is."""
        gate, up = self.apply(packed, x_MK, bias_N).chunk(2, dim=1)
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)

    def fused_rows(self, products: LayerProducts) -> int:
        """Up to how many rows `apply_layer` multiplies by these; 0: none. Allocates scratch: call it before graphs are
        captured, and outside the region whose memory sleep gives back."""
        return 0

    def apply_layer(
        self,
        products: LayerProducts,
        x_MK: torch.Tensor,
        residual_MH: torch.Tensor,
        norms: LayerNorms,
        bias_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """The following layer's qkv [M, N] of the attention's output x: o, residual += and norm, gate_up with its activation,
        down, residual += and norm, qkv and its bias. Updates the residual in place."""
        raise NotImplementedError

    @abstractmethod
    def dequantize(self, packed: Packed) -> torch.Tensor:
        """W_hat [n, k] in the weight's dtype, as `apply` uses it, but that some kernels do not round it. For tests and inspection, not for speed."""
