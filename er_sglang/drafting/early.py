"""Small kernels on Hopper that let the next kernel start early: loads and launches `small_kernels.cuh`."""

from pathlib import Path
from typing import NamedTuple

import torch

from er_sglang.host.releases import adapter

_kernels = adapter("kernels")

WIDTH = 8  # elements that a thread reads at once
MAX_HIDDEN = 1024 * WIDTH
HEAD_DIMS = (64, 128)
DTYPES = (torch.bfloat16, torch.float16)


class HeadNorms(NamedTuple):
    q_weight_D: torch.Tensor
    k_weight_D: torch.Tensor
    eps: float


@_kernels.cache_once
def load(dtype: torch.dtype):
    """The kernels for activations of ``dtype``, compiled at the first call."""
    args = _kernels.make_cpp_args(dtype)
    return _kernels.load_jit(
        "er_sglang_small_kernels",
        *args,
        cuda_files=[str(Path(__file__).with_name("small_kernels.cuh"))],
        cuda_wrappers=[
            (name, f"er_sglang::SmallKernels<{args}>::{name}") for name in ("rms_norm", "silu_and_mul", "rope_store")
        ],
    )


def rms_norm(x_MK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> torch.Tensor:
    """x * weight / rms(x), computed in float32."""
    y_MK = torch.empty_like(x_MK)
    load(x_MK.dtype).rms_norm(x_MK, x_MK[:0], weight_K, y_MK, eps)
    return y_MK


def add_rms_norm_(x_MK: torch.Tensor, residual_MK: torch.Tensor, weight_K: torch.Tensor, eps: float) -> None:
    """residual += x, then x = rms_norm(residual), of the float32 sum."""
    load(x_MK.dtype).rms_norm(x_MK, residual_MK, weight_K, x_MK, eps)


def silu_and_mul(x_MK: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, [M, K / 2], computed in float32; x is gate and up side by side."""
    y_MN = x_MK.new_empty(x_MK.shape[0], x_MK.shape[1] // 2)
    load(x_MK.dtype).silu_and_mul(x_MK, y_MN)
    return y_MN


def rope_store_(
    q_MHD: torch.Tensor,
    k_MHD: torch.Tensor,
    v_MHD: torch.Tensor,
    k_cache_SHD: torch.Tensor,
    v_cache_SHD: torch.Tensor,
    cos_sin_PD: torch.Tensor,
    positions_M: torch.Tensor,
    slots_M: torch.Tensor,
    norms: HeadNorms | None = None,
) -> torch.Tensor:
    """q rotated by its positions (NeoX halves), contiguous; k, rotated too, and v are stored at their slots.

    norms: RMSNorms of the heads of q and k, before the rotation.
    cos_sin float32: cosines of D / 2 angles, then their sines. positions and slots int64: not written by the kernel before.
    """
    rotated_MHD = torch.empty(q_MHD.shape, dtype=q_MHD.dtype, device=q_MHD.device)
    none = q_MHD[:0]
    q_weight_D, k_weight_D, eps = norms or (none, none, 0.0)
    load(q_MHD.dtype).rope_store(
        q_MHD,
        k_MHD,
        v_MHD,
        rotated_MHD,
        k_cache_SHD,
        v_cache_SHD,
        q_weight_D,
        k_weight_D,
        cos_sin_PD,
        positions_M,
        slots_M,
        eps,
    )
    return rotated_MHD
