"""What a weight format is: allocate once, refresh in place, apply."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

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

    @abstractmethod
    def dequantize(self, packed: Packed) -> torch.Tensor:
        """W_hat [n, k] in the weight's dtype, as `apply` uses it, but that some kernels do not round it. For tests and inspection, not for speed."""
