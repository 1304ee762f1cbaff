"""The only attach point: the entry point in the group ``sglang.srt.plugins``."""

from __future__ import annotations

from er_sglang.host import check_host


def activate() -> None:
    """Check the host, hook it, then register SELF_QUANT; called by SGLang in each of its processes.

    Raises UnsupportedHost. SGLang logs it with its reason and goes on without us; SELF_QUANT is then unknown.
    """
    check_host()
    from er_sglang import hooks

    hooks.install()
    register_algorithm()


def register_algorithm() -> None:
    """Check the host and register SELF_QUANT, without hooks: enough to build ``ServerArgs``."""
    check_host()
    from er_sglang.algorithm import register

    register()
