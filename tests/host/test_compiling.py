"""`er-sglang compile`, and the kernels that a start asks for."""

import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from er_sglang.config import DrafterConfig, SelfQuantConfig
from er_sglang.host.machine import compiled_kernels
from tests.host.servers import START_TIMEOUT_S

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("weights, head", [("int4", "int4_rescored"), ("int4_asym", "policy"), ("fp8", "int4")])
def test_every_kernel_has_its_loader(capability, weights, head):
    config = SelfQuantConfig(drafter=DrafterConfig(weights=weights, head=head), max_draft_batch=129)
    kernels = list(compiled_kernels(config, capability, torch.bfloat16))
    assert len(kernels) == (1 if capability == (8, 0) else 5 + (weights == "int4"))
    for kernel in kernels:
        inspect.signature(pkgutil.resolve_name(kernel.loader)).bind(*kernel.arguments)


@pytest.mark.skipif(not (CUDA / "bin/nvcc").exists(), reason=f"there is no nvcc in {CUDA}/bin")
def test_kernels_are_compiled_without_a_card(tmp_path):
    more = {"TVM_FFI_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "LIBRARY_PATH": str(CUDA / "lib64")}
    done = subprocess.run(
        [sys.executable, "-m", "er_sglang.cli", "compile", "--card", "9.0"],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert not done.returncode, done.stderr[-3000:]
    for kernel in compiled_kernels(SelfQuantConfig(), (9, 0), torch.bfloat16):
        assert len(list(tmp_path.glob(f"*{kernel.name}*/*.so"))) == 1
