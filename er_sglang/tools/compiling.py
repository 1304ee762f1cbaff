"""`er-sglang compile`: compile the kernels of a card now, without the card."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pkgutil
from concurrent.futures import ProcessPoolExecutor, as_completed

from tqdm import tqdm

from er_sglang.config import CONFIG_ENV, load_config
from er_sglang.errors import ConfigError

_DESCRIPTION = f"""\
Compile the drafter's CUDA kernels, which a server otherwise compiles at its first start on a machine, for minutes. Run
it where images are built: no GPU is needed, but SGLang in the release that will serve, and nvcc, which the servers then
do without. What is compiled depends on {CONFIG_ENV} (weights, head, group_size, max_draft_batch), as a server
reads it. SGLang's own kernels, and those of Triton, are compiled as ever.
"""

_EXAMPLES = """examples:
  er-sglang compile --card 9.0                    H100, H200
  er-sglang compile --card 8.0 --dtype float16    A100, a policy in fp16
"""


def add_command(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "compile",
        help="compile a card's kernels into an image",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--card", required=True, metavar="MAJOR.MINOR", help="the card's compute capability")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of the policy; default %(default)s"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from er_sglang.host.machine import check_compiler, compiled_folder, compiled_kernels
    from er_sglang.quantize import check_card

    try:
        major, minor = map(int, args.card.split("."))
    except ValueError:
        raise ConfigError(f"--card is {args.card!r}; write its compute capability, as 9.0.") from None
    config = load_config(None, None)
    for name in config.drafter.formats:
        check_card(name, (major, minor), "the card")
    kernels = list(compiled_kernels(config, (major, minor), getattr(torch, args.dtype)))
    check_compiler([kernel.name for kernel in kernels])
    # In processes of their own: what SGLang compiles for is a setting of the process.
    with (
        ProcessPoolExecutor(len(kernels) or 1, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(kernels), desc="compiling", unit="kernel") as bar,
    ):
        jobs = [pool.submit(_compile, kernel, major, minor) for kernel in kernels]
        for job in as_completed(jobs):
            bar.set_postfix_str(job.result())
            bar.update()
    print(f"{compiled_folder()}: {', '.join(kernel.name for kernel in kernels) or 'nothing to compile'}")
    return 0


def _compile(kernel: tuple[str, str, tuple], major: int, minor: int) -> str:
    """kernel: name, loader, arguments, see host/machine.py."""
    from er_sglang.host.releases import adapter

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else SGLang opens the card there is, to ask what it is
    with adapter("kernels").override_jit_cuda_arch(major, minor):
        name, loader, arguments = kernel
        pkgutil.resolve_name(loader)(*arguments)
    return name
