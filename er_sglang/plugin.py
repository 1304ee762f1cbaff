"""The only attach point: the entry point in the group ``sglang.srt.plugins``."""

from __future__ import annotations

from er_sglang.host.seams import check_version


def activate() -> None:
    """Make SELF_QUANT known; called by SGLang in each of its processes, whatever they serve.

    Raises UnsupportedHost for another release. SGLang logs it with its reason and goes on without us; SELF_QUANT is
    then unknown. Whether this copy of the release is unchanged is checked where SELF_QUANT is asked for.
    """
    check_version()
    from er_sglang.host import algorithm, hooks

    hooks.bind(hooks.GATE)
    algorithm.register()
