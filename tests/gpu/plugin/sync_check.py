"""SGLang plugin for tests: PyTorch warns ("called a synchronizing CUDA operation") where the host would wait for the GPU
while a cycle is reserved for, drafted, verified and judged. Such a wait is a wait for all that is in flight.

Provokes one warning at start-up, so that a log without any is known to be of a server that never looked.
"""

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def activate() -> None:
    if not torch.cuda.is_available():  # the other plugins are tried on CPU
        return
    for reserve_or_cycle in (
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode",
        "er_sglang.worker.SelfQuantWorker.cycle",
    ):
        HookRegistry.register(reserve_or_cycle, _watched, HookType.AROUND)
    HookRegistry.register("er_sglang.worker.SelfQuantWorker.init_cuda_graphs", _provoke, HookType.AFTER)


def _watched(original, *args, **more):
    torch.cuda.set_sync_debug_mode("warn")
    try:
        return original(*args, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _provoke(result, worker) -> None:
    _watched(torch.zeros(1, device=worker.device).item)
