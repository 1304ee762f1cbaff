"""`er-sglang calibrate`: measure a configuration's step times now, and keep them as a file."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from er_sglang.config import CACHE_ENV, cache_folder
from er_sglang.errors import ConfigError
from er_sglang.host.seams import ALGORITHM

_DESCRIPTION = """\
Measure how long steps take in one server configuration: plain decoding, drafting and verifying, by batch size and
context. A server measures them by itself when it starts for the first time, so you need this only to have the table as
a file: to simulate, to plot, or to ship it to servers without a common cache ({"profile": PATH} in their config).

It starts a server with the arguments after "--", which measures anew, keeps the table, for later servers here too, and
stops the server. Run it on the GPUs and with the arguments you will serve with: a table that was measured in another
configuration is refused.
"""

_EXAMPLES = """examples:
  er-sglang calibrate --model-path Qwen/Qwen2.5-14B --out 14b.json
  er-sglang calibrate --model-path Qwen/Qwen2.5-14B --out 14b-tp2.json -- --tp 2 --speculative-num-steps 5
  er-sglang plot crossover 14b.json --acceptance 0.9
  er-sglang simulate --profile 14b.json --alpha 0.9
"""


def add_command(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a server configuration's step times",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", required=True, help="the policy, as for sglang.launch_server")
    parser.add_argument(
        "--out", type=Path, default=Path("profile.json"), help="default %(default)s; the log is beside it"
    )
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="give up after this long (default %(default)s)")
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER_ARG", help="arguments of sglang.launch_server")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from er_sglang.tools.serving import Server

    with tempfile.TemporaryDirectory() as empty:  # a cache that knows no times: they are measured now
        server = Server(
            args.model_path,
            {"speculative-algorithm": ALGORITHM},
            extra_words=args.server_args,
            env={CACHE_ENV: empty},
            log_path=args.out.with_suffix(".log"),
            start_timeout_s=args.timeout_s,
        )
        with server:
            state = server.self_quant()
        if state["profile"] is None:
            raise ConfigError(f'policy mode "{state["mode"]}" decides without step times: choose "auto" or "paper".')
        measured = Path(state["profile"])
        if not measured.is_relative_to(empty):
            raise ConfigError(f'the config names a profile, {measured}: leave "profile" out to measure one.')
        shutil.copyfile(measured, args.out)
        cached = cache_folder() / measured.relative_to(empty)
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(measured, cached)
    print(f"{args.out}: step times of {args.model_path}, gammas {state['gammas']}")
    return 0
