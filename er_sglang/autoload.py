"""`er-sglang autoload on|off|status`: make SELF_QUANT known in every process of this Python, SGLang untouched.

`on` writes `er_sglang_autoload.pth` into site-packages. Each interpreter then runs `install()` at its start, which
puts one finder in front of `sys.meta_path`. It waits for `sglang.srt.speculative.spec_info`, and makes
`SpeculativeAlgorithm.from_string` load SGLang's plugins when it is asked for SELF_QUANT and does not know it yet:
what `patches/` does in the source. Nothing is registered before that question, since `spec_info` is imported half-way
through SGLang's scheduler and by servers that never speculate.

Every interpreter imports this module, SGLang or not: nothing heavy at the top.
"""

import sys
from importlib.machinery import PathFinder

SPEC_INFO = "sglang.srt.speculative.spec_info"
PTH_NAME = "er_sglang_autoload.pth"
# Does nothing once er_sglang is uninstalled. Python reports any other failure of such a line on stderr and goes on.
PTH_LINE = (
    "import importlib.util as u; u.find_spec('er_sglang') and __import__('er_sglang.autoload').autoload.install()\n"
)


def install() -> None:
    """Extend `from_string` when SGLang's `spec_info` is imported."""
    sys.meta_path.insert(0, _SpecInfoFinder())


class _SpecInfoFinder:
    def find_spec(self, name, path, target=None):
        if name != SPEC_INFO:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module):
                execute(module)
                _extend(module)

            spec.loader.exec_module = execute_and_extend
        return spec


def _extend(spec_info) -> None:
    try:
        from sglang.srt.speculative.spec_registry import get_spec

        from er_sglang.host.seams import ALGORITHM, check_version

        algorithms = spec_info.SpeculativeAlgorithm
        known = algorithms.from_string
    except (ImportError, AttributeError) as error:
        import warnings

        warnings.warn(f"er_sglang cannot make SELF_QUANT available: {error}", RuntimeWarning, stacklevel=2)
        return

    def from_string(name):
        if name is not None and name.upper() == ALGORITHM and get_spec(name) is None:
            from sglang.srt.plugins import load_plugins

            load_plugins()
            check_version()  # load_plugins only logs why a plugin refused; this raises it
        return known(name)

    algorithms.from_string = staticmethod(from_string)


def pth_path():
    """Where the line goes: the site-packages of this interpreter."""
    import sysconfig
    from pathlib import Path

    return Path(sysconfig.get_path("purelib")) / PTH_NAME


def add_command(subparsers) -> None:
    import argparse

    parser = subparsers.add_parser(
        "autoload",
        help="make SELF_QUANT known in every process of this Python, without patching SGLang",
        description="""\
Make SELF_QUANT known in every process of this Python, without patching SGLang.

You need this only if something else than SGLang builds ServerArgs(speculative_algorithm="SELF_QUANT"), as slime,
veRL and NeMo-RL do in their Ray actors, and you may not patch SGLang (else: `er-sglang patch`).
Run it with the Python that runs those actors, on every machine or in the image.

on      write er_sglang_autoload.pth into site-packages; takes effect in interpreters started afterwards
off     remove it (do so before `pip uninstall er_sglang`)
status  exit code 0 if on, 1 if off""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("on", "off", "status"))
    parser.set_defaults(run=run)


def run(args) -> int:
    path = pth_path()
    try:
        if args.action == "on":
            path.write_text(PTH_LINE)
        elif args.action == "off":
            path.unlink(missing_ok=True)
    except OSError as error:
        print(f"er-sglang autoload {args.action}: {error}", file=sys.stderr)
        return 1
    is_on = path.is_file()
    print(f"autoload is {'on' if is_on else 'off'}: {path}")
    return int(args.action == "status" and not is_on)
