"""Machines that cannot serve, each with its sentence; the GPU is a stand-in."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from er_sglang.cli import main
from er_sglang.config import DrafterConfig, SelfQuantConfig
from er_sglang.errors import ConfigError
from er_sglang.host import machine


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU of the given capability, a compiler and no compiled kernel."""

    def gpu(*capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capability))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the card")
        return tmp_path

    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "cuda/bin"))
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/bin/nvcc").touch(mode=0o755)
    return gpu


def check(weights, head="policy", **settings):
    machine.check_machine(SelfQuantConfig(drafter=DrafterConfig(weights=weights, head=head), **settings))


def test_a_machine_that_can(gpu):
    gpu(9, 0)
    check("int4")
    check("fp8")


def test_a_machine_without_gpus_is_not_judged(gpu):
    (gpu() / "cuda/bin/nvcc").unlink()
    check("int4")


@pytest.mark.parametrize(
    ("capability", "weights", "words"),
    [
        ((8, 0), "fp8", "needs compute capability 8.9 or newer, the card has 8.0: use int4 instead"),
        ((8, 6), "fp8", "needs compute capability 8.9 or newer, the card has 8.6: use int4 instead"),
        ((7, 5), "int4", "needs compute capability 8.0 or newer, the card has 7.5: serve without SELF_QUANT"),
    ],
)
def test_an_old_card(gpu, capability, weights, words):
    gpu(*capability)
    with pytest.raises(ValueError, match=words):
        check(weights)


def test_nothing_is_compiled_for_an_old_card(gpu, capsys):
    gpu()
    assert main(["compile", "--card", "7.5"]) == 1
    assert "needs compute capability 8.0 or newer, the card has 7.5" in capsys.readouterr().err


def compiled(folder, *kernels):
    for name in kernels:
        (folder / f"compiled/sgl_kernel_jit_{name}_1").mkdir(parents=True)
        (folder / f"compiled/sgl_kernel_jit_{name}_1/kernel.so").touch()


def test_no_compiler(gpu, monkeypatch):
    folder = gpu(8, 9)
    (folder / "cuda/bin/nvcc").unlink()
    monkeypatch.setenv("CUDA_HOME", f"{folder}/cuda")
    with pytest.raises(ConfigError, match=f"no nvcc in {folder}/cuda/bin, and kernels are compiled at the first"):
        check("int4")
    with pytest.raises(ConfigError, match="no nvcc"):
        check("fp8", head="int4")
    check("fp8")
    compiled(folder, "gptq_marlin")
    check("int4")


def test_no_compiler_on_hopper(gpu, monkeypatch):
    """There drafts of any format have norms, activations and rotation of ours."""
    folder = gpu(9, 0)
    (folder / "cuda/bin/nvcc").unlink()
    monkeypatch.setenv("CUDA_HOME", f"{folder}/cuda")
    with pytest.raises(ConfigError, match=r"\(er_sglang_small_kernels, er_sglang_decode_attention\)"):
        check("fp8")
    compiled(folder, "er_sglang_small_kernels", "er_sglang_decode_attention")
    check("fp8")
    with pytest.raises(
        ConfigError, match=r"\(er_sglang_small_batch_gemm, er_sglang_wgmma_gemm, er_sglang_fused_layer\)"
    ):
        check("int4")
    compiled(folder, "er_sglang_small_batch_gemm", "er_sglang_wgmma_gemm")
    check("int4_asym")
    check("fp8", head="int4")
    with pytest.raises(ConfigError, match=r"\(er_sglang_fused_layer\)"):
        check("int4")
    machine.check_machine(SelfQuantConfig(drafter=DrafterConfig(weights="int4", head="policy", group_size=64)))
    compiled(folder, "er_sglang_fused_layer")
    check("int4")
    with pytest.raises(ConfigError, match=r"\(gptq_marlin\)"):
        check("int4", max_draft_batch=129)


def test_a_full_disk(gpu, monkeypatch):
    folder = gpu(9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e6 if path == folder else 1e12))
    with pytest.raises(ConfigError, match=f"The disk of {folder}/compiled has 3 MB left"):
        check("int4")


def test_too_little_memory():
    @machine.needs_memory("graphs", "lower this")
    def capture(error, by_sglang=False):
        try:
            if error:
                raise error
        except RuntimeError as failed:
            if not by_sglang:
                raise
            raise Exception(f"Capture cuda graph failed: {failed}")

    capture(None)
    for by_sglang in (False, True):
        with pytest.raises(ConfigError, match="Too little GPU memory for graphs: lower this."):
            capture(torch.OutOfMemoryError("CUDA out of memory."), by_sglang)
        with pytest.raises(Exception, match="another") as raised:
            capture(RuntimeError("another"), by_sglang)
        assert raised.type is not ConfigError
