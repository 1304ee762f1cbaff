"""A CUDA kernel compiled for the CPU by g++, to test its logic without a GPU; see cuda_on_cpu.h."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import torch

SHIM = Path(__file__).with_name("cuda_on_cpu.h")


class Kernel:
    """Called as er_sglang.sampling.nvrtc.Kernel is, with tensors of the CPU."""

    def __init__(self, source: Path, name: str, threads: int, folder: Path) -> None:
        library = folder / f"{name}.so"
        code = f"""
            #include "{SHIM}"
            #include "{source}"
            extern "C" void launch(int blocks, int threads, void** args) {{ on_cpu::launch({name}, blocks, threads, args); }}
        """
        command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-x", "c++", "-o", str(library), "-"]
        subprocess.run(command, input=code, text=True, check=True)
        self._threads = threads
        self._launch = ctypes.CDLL(str(library)).launch

    def __call__(self, blocks: int, *args: torch.Tensor | int) -> None:
        values = [
            ctypes.c_void_p(arg.data_ptr()) if isinstance(arg, torch.Tensor) else ctypes.c_int(arg) for arg in args
        ]
        self._launch(blocks, self._threads, (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values)))
