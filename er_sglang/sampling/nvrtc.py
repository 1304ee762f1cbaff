"""CUDA kernels compiled at run time by NVRTC, which comes with torch: no nvcc is needed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from cuda.bindings import driver, nvrtc


class Kernel:
    """An ``extern "C"`` kernel of a source file, compiled for the current device."""

    def __init__(self, source: Path, name: str, threads: int) -> None:
        """threads: of a block."""
        self._threads = threads
        torch.cuda.current_stream()  # the driver needs the context that torch makes
        self._module = _checked(driver.cuModuleLoadData(_compiled(source)))
        self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))

    def __call__(self, blocks: int, *args: torch.Tensor | int) -> None:
        """Launch on the current stream. Tensors are passed as pointers, integers as int."""
        values = tuple(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
        types = tuple(ctypes.c_void_p if isinstance(arg, torch.Tensor) else ctypes.c_int for arg in args)
        stream = torch.cuda.current_stream().cuda_stream
        _checked(
            driver.cuLaunchKernel(self._function, blocks, 1, 1, self._threads, 1, 1, 0, stream, (values, types), 0)
        )


def _compiled(source: Path) -> bytes:
    major, minor = torch.cuda.get_device_capability()
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"{source.name} did not compile:\n{log.decode()}")
    binary = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, binary))
    return binary


def _checked(result: tuple):
    """What a call returned beside its status."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA: {status!r}")
    return values[0] if values else None
