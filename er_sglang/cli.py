"""The ``er-sglang`` command."""

from __future__ import annotations

import argparse
import sys

from er_sglang import __version__
from er_sglang.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    from er_sglang import autoload
    from er_sglang.tools import acceptance, calibrate, compiling, patching, plots, simulate

    parser = argparse.ArgumentParser(prog="er-sglang", description="Self-quantized speculative decoding for SGLang.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (acceptance, calibrate, simulate, plots, compiling, patching, autoload):
        module.add_command(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ConfigError, OSError) as error:
        print(f"er-sglang: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
