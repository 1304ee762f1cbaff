"""SGLang plugin for tests: prints what Triton compiles, or loads from its cache, while slots are reserved for a step and
while a cycle runs."""

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


def _watched(original, *args, **more):
    from triton import knobs

    def tell(*, src, **_) -> None:
        print(f"COMPILED {src.name} in {original.__name__}", flush=True)

    knobs.compilation.listener = tell
    try:
        return original(*args, **more)
    finally:
        knobs.compilation.listener = None
