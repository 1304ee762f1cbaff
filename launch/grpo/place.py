"""Where a run takes place: on the CPU in float32, or on one GPU in bfloat16, which server and trainer use by turns."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from er_sglang.tools.serving import CPU_ARGS, CPU_ENV

GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class UsedGB:
    trainer: float
    """By its tensors, and by what it keeps for later ones: the most since it was last cleared."""
    others: float
    """By the server, and by the contexts of both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """server_args, server_env: what the server is started with there. max_bucket_bytes: of weights sent at once."""

    device: torch.device
    dtype: torch.dtype
    server_args: Mapping[str, object]
    server_env: Mapping[str, str]
    max_bucket_bytes: int

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def clear(self) -> None:
        """Give back what the trainer has cached, and forget the tensors that the server has read."""
        if self.is_gpu:
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def used_gb(self) -> UsedGB | None:
        """Of the card; None on the CPU."""
        if not self.is_gpu:
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        trainer = torch.cuda.memory_reserved(self.device)
        return UsedGB(trainer=trainer / GB, others=(total - free - trainer) / GB)


CPU = Place(
    device=torch.device("cpu"),
    dtype=torch.float32,  # so that the server's log-probabilities are the trainer's but for rounding
    server_args={**CPU_ARGS, "sleep-on-idle": True},  # the trainer wants the cores
    server_env={**CPU_ENV, "CUDA_VISIBLE_DEVICES": ""},
    max_bucket_bytes=300 * 1024,  # so small that even the toy travels in several, a layer's q without its k and v
)
GPU = Place(
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
    server_args={
        "dtype": "bfloat16",
        "mem-fraction-static": 0.3,
        "enable-memory-saver": True,
        "cuda-graph-backend-prefill": "disabled",  # captured for a minute, and rollouts decode
    },
    server_env={"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true"},
    max_bucket_bytes=512 * 1024**2,  # slime's default
)
