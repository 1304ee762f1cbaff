"""SGLang plugin for tests, of each step: what must not happen while slots are reserved for it and while a cycle is drafted,
verified and judged.

- PyTorch warns ("called a synchronizing CUDA operation") where the host would wait for the GPU: for all that is in flight.
  One warning is provoked at start-up, so that a log without any is known to be of a server that never looked.
- What Triton compiles, or loads from its cache, is printed ("COMPILED").
"""

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType


def activate() -> None:
    if not torch.cuda.is_available():  # the other plugin is tried on CPU
        return
    for reserve_or_cycle in (
        "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_decode",
        "er_sglang.worker.SelfQuantWorker.cycle",
    ):
        HookRegistry.register(reserve_or_cycle, _watched, HookType.AROUND)
    HookRegistry.register("er_sglang.worker.SelfQuantWorker.init_cuda_graphs", _provoke, HookType.AFTER)


def _watched(original, *args, **more):
    from triton import knobs

    def tell(*, src, **_) -> None:
        print(f"COMPILED {src.name} in {original.__name__}", flush=True)

    torch.cuda.set_sync_debug_mode("warn")
    knobs.compilation.listener = tell
    try:
        return original(*args, **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        knobs.compilation.listener = None


def _provoke(result, worker) -> None:
    _watched(torch.zeros(1, device=worker.device).item)
