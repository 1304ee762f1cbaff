"""What a machine lacks, in a sentence that says what to do: before the policy is loaded, or when memory runs out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from er_sglang.config import SelfQuantConfig
from er_sglang.errors import ConfigError
from er_sglang.quantize import check_card
from er_sglang.quantize.blocks import MAX_ROWS

COMPILED_BYTES = 100_000_000  # room for a kernel's library and what its compiler leaves beside it


def check_machine(config: SelfQuantConfig) -> None:
    """Raise if the GPU, the compiler or the disk of this machine cannot serve the drafter.

    ServerArgs may be built on a machine without GPUs that serves nothing itself: it is not judged.
    """
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability("cuda")
        for name in config.drafter.formats:
            check_card(name, capability, torch.cuda.get_device_name("cuda"))
        check_compiler([kernel.name for kernel in compiled_kernels(config, capability, torch.bfloat16)])


class Kernel(NamedTuple):
    """What SGLang's ``load_jit`` compiles once on a machine, by tvm_ffi, and keeps; `loader` names the function that asks
    for it."""

    name: str
    loader: str
    arguments: tuple


def compiled_kernels(config: SelfQuantConfig, capability: tuple[int, int], dtype: torch.dtype) -> Iterator[Kernel]:
    """Of a server of a policy in `dtype` on a card of that compute capability."""
    int4 = [(dtype, name == "int4", config.drafter.group_size) for name in config.drafter.formats if "int4" in name]
    hopper = capability == (9, 0)
    if int4 and not (hopper and config.max_draft_batch <= MAX_ROWS):
        yield Kernel("gptq_marlin", "er_sglang.quantize.modules:marlin_module", (dtype,))
    if hopper:
        yield Kernel("er_sglang_small_kernels", "er_sglang.drafting.early:load", (dtype,))
        yield Kernel("er_sglang_decode_attention", "er_sglang.drafting.attention:load", (dtype,))
        for arguments in int4:
            yield Kernel("er_sglang_small_batch_gemm", "er_sglang.quantize.modules:small_batch_module", arguments)
            yield Kernel("er_sglang_wgmma_gemm", "er_sglang.quantize.modules:wgmma_module", arguments)
        drafter = config.drafter
        if (drafter.weights, drafter.group_size, dtype) == ("int4", 128, torch.bfloat16):
            yield Kernel("er_sglang_fused_layer", "er_sglang.quantize.modules:fused_layer_module", ())


def compiled_folder(env: Mapping[str, str] = os.environ) -> Path:
    """Where tvm_ffi keeps them."""
    return Path(env.get("TVM_FFI_CACHE_DIR") or "~/.cache/tvm-ffi").expanduser()


def check_compiler(kernels: Sequence[str], env: Mapping[str, str] = os.environ) -> None:
    """Raise unless each of these was compiled, or can be."""
    folder = compiled_folder(env)
    missing = [name for name in kernels if not any(folder.glob(f"*{name}*/*.so"))]
    if not missing:
        return
    # Where tvm_ffi looks.
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH") or (on_path and Path(on_path).parents[1]) or "/usr/local/cuda"
    if not Path(home, "bin", "nvcc").is_file():
        raise ConfigError(
            f"There is no nvcc in {home}/bin, and kernels are compiled at the first start ({', '.join(missing)}): install "
            f"the CUDA toolkit and set CUDA_HOME, or copy {folder} from a machine that has them, by `er-sglang compile` "
            "where an image is built, say. Only fp8 on cards other "
            'than Hopper, "drafter": {"weights": "fp8", "head": "policy"}, needs no compiler (SM89 or newer).'
        )
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if (free := shutil.disk_usage(existing).free) < COMPILED_BYTES:
        raise ConfigError(
            f"The disk of {folder} has {free / 1e6:.0f} MB left, and compiled kernels need {COMPILED_BYTES / 1e6:.0f}: "
            "free some, or set TVM_FFI_CACHE_DIR to another disk."
        )


@contextmanager
def needs_memory(what: str, remedy: str) -> Iterator[None]:
    """Say what there was no GPU memory for; raises ConfigError."""
    try:
        yield
    except Exception as error:
        # SGLang's graph runner raises a bare Exception of its own over what a capture raised.
        if not any(isinstance(each, torch.OutOfMemoryError) for each in (error, error.__context__)):
            raise
        raise ConfigError(f"Too little GPU memory for {what}: {remedy}.") from error
