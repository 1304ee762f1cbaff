"""Processes that SGLang starts without plugins: they are handed what of ours they need."""

from __future__ import annotations

from functools import partial

from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from er_sglang.host.seams import asks_for_us

# -- the detokenizer -------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The part of a stream's text that later tokens cannot change: all but the bytes of an incomplete character.

    SGLang's ``find_printable_text`` also holds back incomplete words, so with more text it may find less to be
    printable. The detokenizer then forgets that it has sent the rest, and sends it twice. With one token a step this
    takes an unusual token; with several, a CJK character and a letter before an incomplete character suffice.
    """
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


def _run_detokenizer(main, *args) -> None:
    target = "sglang.srt.managers.detokenizer_manager.find_printable_text"
    HookRegistry._apply_target(target, [(HookType.REPLACE, printable, HookSource("self_quant", "er_sglang"))])
    main(*args)


def _launch_detokenizers(original, engine, *, server_args, run_detokenizer_process_func, **more):
    if asks_for_us(server_args):
        run_detokenizer_process_func = partial(_run_detokenizer, run_detokenizer_process_func)
    return original(engine, server_args=server_args, run_detokenizer_process_func=run_detokenizer_process_func, **more)


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
    if asks_for_us(server_args):
        scheduler_info = _WithPlugins(scheduler_info)
    return original(port_args, server_args, scheduler_info)


PROCESS_HOOKS = {
    "sglang.srt.entrypoints.engine.Engine._launch_detokenizer_subprocesses": (HookType.AROUND, _launch_detokenizers),
    "sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer": (HookType.AROUND, _write_worker_args),
}
