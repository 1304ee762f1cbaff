"""The only attach point: the entry point in the group ``sglang.srt.plugins``."""

from __future__ import annotations

from er_sglang.host.seams import check_host


def activate() -> None:
    """Check the host, hook it, then register SELF_QUANT; called by SGLang in each of its processes.

    Raises UnsupportedHost. SGLang logs it with its reason and goes on without us; SELF_QUANT is then unknown.
    """
    check_host()
    from er_sglang.host import algorithm, hooks

    hooks.install()
    algorithm.register()
