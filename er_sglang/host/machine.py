"""What a machine lacks, in a sentence that says what to do: before the policy is loaded, or when memory runs out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

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
        for name in config.drafter.formats:
            check_card(name, torch.device("cuda"))
        _check_compiler(list(_compiled_kernels(config)))


def _compiled_kernels(config: SelfQuantConfig) -> Iterator[str]:
    """The kernels that SGLang's ``load_jit`` compiles at the first start, by tvm_ffi, and keeps."""
    int4 = any(name.startswith("int4") for name in config.drafter.formats)
    hopper = torch.cuda.get_device_capability("cuda") == (9, 0)
    if int4 and not (hopper and config.max_draft_batch <= MAX_ROWS):
        yield "gptq_marlin"
    if hopper:
        yield from ("er_sglang_small_kernels", "er_sglang_decode_attention")
        if int4:
            yield from ("er_sglang_small_batch_gemm", "er_sglang_wgmma_gemm")


def _check_compiler(kernels: Sequence[str], env: Mapping[str, str] = os.environ) -> None:
    folder = Path(env.get("TVM_FFI_CACHE_DIR") or "~/.cache/tvm-ffi").expanduser()
    missing = [name for name in kernels if not any(folder.glob(f"*{name}*/*.so"))]
    if not missing:
        return
    # Where tvm_ffi looks.
    on_path = shutil.which("nvcc", path=env.get("PATH"))
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH") or (on_path and Path(on_path).parents[1]) or "/usr/local/cuda"
    if not Path(home, "bin", "nvcc").is_file():
        raise ConfigError(
            f"There is no nvcc in {home}/bin, and kernels are compiled at the first start ({', '.join(missing)}): install "
            f"the CUDA toolkit and set CUDA_HOME, or copy {folder} from a machine that has them. Only fp8 on cards other "
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
