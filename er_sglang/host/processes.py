"""Processes that SGLang starts without plugins: they are handed what of ours they need."""

from __future__ import annotations

from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookType

from er_sglang.host.seams import ALGORITHM

# -- more tokenizer workers ------------------------------------------------------------------------------------


class _WithPlugins:
    """Travels in place of a value to another process, which loads SGLang's plugins before it gets the value."""

    def __init__(self, value) -> None:
        self._value = value

    def __reduce__(self):
        return _load_plugins_first, (self._value,)


def _load_plugins_first(value):
    load_plugins()
    return value


def _write_worker_args(original, port_args, server_args, scheduler_info):
    """``--tokenizer-worker-num`` above 1: the workers read these from shared memory, then ask for our algorithm."""
    if server_args.speculative_algorithm == ALGORITHM:
        scheduler_info = _WithPlugins(scheduler_info)
    return original(port_args, server_args, scheduler_info)


PROCESS_HOOKS = {
    "sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer": (HookType.AROUND, _write_worker_args),
}
