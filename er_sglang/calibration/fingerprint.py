"""Everything that measured step times depend on, in plain values that compare and print well."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path

import torch
from sglang.srt.distributed import get_tp_group

import er_sglang
from er_sglang.calibration.subject import Subject

# Rooms whose sources decide how long a step takes, and how that is measured.
_TIMED_ROOMS = ("cycle", "drafting", "quantize", "sampling", "calibration")
_SERVER_ARGS = (
    "nnodes",
    "quantization",
    "fp8_gemm_runner_backend",
    "sampling_backend",
    "kv_cache_dtype",
    "page_size",
    "disable_custom_all_reduce",
    "enable_symm_mem",
    "enable_mscclpp",
    "enable_torch_symm_mem",
    "enable_nccl_nvls",
    "enable_flashinfer_allreduce_fusion",
)


def fingerprint(subject: Subject) -> dict[str, object]:
    """A profile is used only where this is equal."""
    runner, config, args = subject.runner, subject.config, subject.server_args
    on_gpu = subject.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(subject.device) if on_gpu else platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "sglang": importlib.metadata.version("sglang"),
        "er_sglang": f"{er_sglang.__version__}, sources {_digest_of_sources()}",
        "model": _digest(runner.model_config.hf_config.to_dict()),
        "dtype": str(runner.model_config.dtype),
        "context_length": runner.model_config.context_len,
        "tp_size": get_tp_group().world_size,
        "attention": type(runner.attn_backend).__name__,
        "drafter": list(dataclasses.astuple(config.drafter)),
        "windows": list(config.drafter.windows),
        "gamma_max": config.gamma_max,
        "gammas": list(config.policy.gammas),
        "draft_graph_batches": subject.graph_batches,
        "target_graph_batches": subject.target_graph_batches,
        **{name: getattr(args, name) for name in _SERVER_ARGS},
    }


def timed_sources() -> list[Path]:
    package = Path(er_sglang.__file__).parent
    files = (file for room in _TIMED_ROOMS for file in (package / room).iterdir())
    return [package / "worker.py", *sorted(file for file in files if file.suffix in (".py", ".cuh", ".cu"))]


def _digest_of_sources() -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in timed_sources())).hexdigest()[:16]


def _digest(hf_config: dict) -> str:
    """Of a model's dimensions; where it was loaded from does not matter."""
    kept = {key: value for key, value in hf_config.items() if key not in ("_name_or_path", "transformers_version")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:16]
