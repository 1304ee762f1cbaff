"""The compiled modules of int4 products: ours for Hopper, of `small_batch_gemm.cuh`, `wgmma_gemm.cuh` and
`fused_layer.cuh`, and SGLang's Marlin. SGLang's ``load_jit`` compiles each once on a machine; loading needs no GPU."""

import functools
from pathlib import Path

import torch

from er_sglang.host.releases import adapter

_kernels = adapter("kernels")


@_kernels.cache_once
def small_batch_module(dtype: torch.dtype, symmetric: bool, group_size: int):
    return _load("small_batch_gemm", "SmallBatchGemm", {"gemm": "run"}, dtype, symmetric, group_size)


@_kernels.cache_once
def wgmma_module(dtype: torch.dtype, symmetric: bool, group_size: int):
    with _kernels.override_jit_cuda_arch(9, 0, "a"):  # wgmma exists for sm_90a alone
        exports = {"gemm": "run", "resident_clusters": "resident_clusters"}
        return _load("wgmma_gemm", "WgmmaGemm", exports, dtype, symmetric, group_size)


@_kernels.cache_once
def fused_layer_module():
    """For bfloat16, symmetric weights and groups of 128 alone."""
    with _kernels.override_jit_cuda_arch(9, 0, "a"):
        return _load("fused_layer", "FusedLayer", {"run": "run"})


def _load(source: str, struct: str, exports: dict[str, str], *template_arguments: torch.dtype | bool | int):
    args = _kernels.make_cpp_args(*template_arguments)
    struct = f"er_sglang::{struct}<{args}>" if args else f"er_sglang::{struct}"
    return _kernels.load_jit(
        f"er_sglang_{source}",
        *args,
        cuda_files=[str(Path(__file__).with_name(f"{source}.cuh"))],
        cuda_wrappers=[(name, f"{struct}::{function}") for name, function in exports.items()],
    )


@functools.cache
def marlin_module(dtype: torch.dtype):
    """Holds the kernels of symmetric and asymmetric weights, for all group sizes: minutes to compile."""
    return adapter("marlin")._jit_gptq_marlin_module(dtype)
