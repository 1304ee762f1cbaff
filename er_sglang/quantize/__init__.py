"""Weight formats of the drafter.

    fmt = create_format("int4", group_size=128, device=torch.device("cuda"))
    reason = fmt.unsupported(n, k, dtype)        # None: convertible
    packed = fmt.allocate(n, k, dtype, device)   # once
    fmt.refresh_(packed, weight_NK)              # after every policy update, in place
    y_MN = fmt.apply(packed, x_MK, bias_N)

int4       symmetric, round to nearest, one scale per group of input features: 4 + 16/g bits a weight
int4_asym  with a 4-bit zero point per group: 4 + 20/g bits a weight
fp8        e4m3, one scale per output feature: 8 bits a weight; on CUDA activations are e4m3 too, scaled per token

A policy in fp8 is given as a `ScaledWeight`; int4 is made of its codes times their scales in the same pass.

On CUDA int4 is Marlin's layout, refreshed by one fused kernel per weight and multiplied by our kernels (Hopper, up to
128 rows) or Marlin's; on CPU all is plain torch. Up to 8 rows, on Hopper, `fused_layer` multiplies all of a decoder layer at
once, if weights are symmetric, in groups of 128, of bf16.
`rtn` defines the numbers, `marlin_layout` the bytes, `kernels` does both at once.
"""

import torch

from er_sglang.config import WEIGHT_FORMATS
from er_sglang.errors import ConfigError
from er_sglang.quantize.base import Format, Packed

__all__ = ["Format", "Packed", "create_format"]

_MIN_CAPABILITY = {"int4": (8, 0), "int4_asym": (8, 0), "fp8": (8, 9)}


def create_format(name: str, *, group_size: int, device: torch.device) -> Format:
    """The format `name` for weights on `device`: torch reference on CPU, kernels on CUDA.

    `group_size` is in input features; fp8 has one scale per output feature and ignores it.
    Raises ValueError, saying what to choose instead, when the name, group size or device is not supported.
    """
    if name not in WEIGHT_FORMATS:
        raise ValueError(f"unknown weight format {name!r}: choose one of {', '.join(WEIGHT_FORMATS)}")
    if device.type == "cpu":
        from er_sglang.quantize.reference import ReferenceFp8, ReferenceInt4

        return ReferenceFp8() if name == "fp8" else ReferenceInt4(group_size=group_size, symmetric=name == "int4")
    if device.type != "cuda":
        raise ValueError(f"weight formats exist for cpu and cuda devices, not for {device.type!r}")

    check_card(name, torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))
    if name == "fp8":
        from er_sglang.quantize.scaled_mm import ScaledMmFp8

        return ScaledMmFp8()
    from er_sglang.quantize.marlin import MarlinInt4

    return MarlinInt4(group_size=group_size, symmetric=name == "int4", device=device)


def check_card(name: str, capability: tuple[int, int], card: str) -> None:
    """Raise ConfigError, saying what to choose instead, unless cards of that compute capability have kernels for the format
    `name`."""
    if capability < _MIN_CAPABILITY[name]:
        instead = "use int4 instead" if capability >= _MIN_CAPABILITY["int4"] else "serve without SELF_QUANT on it"
        raise ConfigError(
            f"weight format {name} needs compute capability {_dotted(_MIN_CAPABILITY[name])} or newer, "
            f"{card} has {_dotted(capability)}: {instead}"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
