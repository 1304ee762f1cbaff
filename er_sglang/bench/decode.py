"""`launch/bench`: decode throughput of plain SGLang, STANDALONE and SELF_QUANT over a grid of concurrency."""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from math import ceil
from pathlib import Path
from statistics import median

from tqdm import tqdm

from er_sglang.bench import report
from er_sglang.bench.arms import (
    ARMS,
    SEED,
    Arm,
    add_server_arguments,
    arm_argument,
    keep_profile,
    server_args,
    server_env,
    server_name,
    servers,
    shared_args,
)
from er_sglang.bench.client import run_load
from er_sglang.bench.load import STREAM_INTERVAL_TOKENS, WARM_UP_TOKENS, LoadResult, Request, random_prompts
from er_sglang.bench.shapes import SHAPES, write_model
from er_sglang.tools.results import environment, table, write_json
from er_sglang.tools.serving import ON_CPU, Server, exit_on_sigterm

DESCRIPTION = """\
Measure decode throughput, arm by arm, on the same model and the same prompts.

The SELF_QUANT arms share a server that is switched between them; every other arm gets its own. At each concurrency C,
C requests of equal context and equal output length (--output-tokens, end-of-sequence ignored) are sent at once. Counted
are only the tokens between the moment the last request has its first token and the moment the first one ends: a full
batch, no prefill.
The prompts are in the radix cache beforehand. The figure is the median of --repeats; the spread is (max - min) /
median.
"""

EPILOG = f"""\
{ARMS}
acceptance
  A model given by shape has random weights, so acceptance is stated, not measured: --acceptance A is the
  probability that a drafted token is accepted, given that those before it were. All arms that draft get the
  same: SELF_QUANT by ER_SGLANG_SIMULATE_ACCEPTANCE=A, STANDALONE by SGLANG_SIMULATE_ACC_LEN, set to
  (1 - A^(G+1)) / (1 - A), the same accept length in expectation. All computation is done, its verdict is replaced.
  A checkpoint given by path (not a shape) is measured with its real acceptance, on random prompts.

examples
  launch/bench --model 14b
  launch/bench --model 7b --arms plain self_quant:3 --concurrency 1 8 32 --acceptance 0.85
  launch/bench --model tiny --arms plain self_quant:3        on a CPU: shows that it works, not how fast
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default_arms = (
        ["plain", "self_quant:0", "self_quant:3"]
        if ON_CPU
        else ["plain", "standalone:3", "self_quant:0", "self_quant:3", "auto:7"]
    )
    grid = [1, 4] if ON_CPU else [1, 2, 4, 8, 16, 32, 64, 128]
    parser.add_argument(
        "--model",
        default="tiny" if ON_CPU else "14b",
        help=f"a shape ({', '.join(SHAPES)}) or a checkpoint's path; default %(default)s",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        type=arm_argument,
        default=[Arm.parse(a) for a in default_arms],
        metavar="ARM",
        help=f"see below; default {' '.join(default_arms)}",
    )
    parser.add_argument(
        "--concurrency",
        nargs="+",
        type=int,
        default=grid,
        metavar="C",
        help=f"requests at once; default {' '.join(map(str, grid))}",
    )
    parser.add_argument(
        "--acceptance",
        type=float,
        default=0.9,
        metavar="A",
        help="stated acceptance per drafted token, for shapes; default %(default)s",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=64 if ON_CPU else 1024,
        metavar="TOKENS",
        help="prompt length; default %(default)s",
    )
    parser.add_argument(
        "--output-tokens",
        type=int,
        default=64 if ON_CPU else 256,
        metavar="TOKENS",
        help="response length; default %(default)s",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="measurements per point; default %(default)s"
    )
    parser.add_argument(
        "--least-tokens",
        type=int,
        default=0,
        metavar="N",
        help="repeat a point more often, until so many tokens are generated: acceptance of few tokens is chance; "
        "default %(default)s",
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="default %(default)s")
    add_server_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="folder for results.json, table.md, plot.png, profile.json and logs; default %(default)s",
    )
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    args = parser.parse_args(argv)
    if not args.no_plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plot needs matplotlib: pip install '.[plot]' in this checkout, or give --no-plot")
    if not 0.0 <= args.acceptance < 1.0:
        parser.error(f"--acceptance is {args.acceptance}; it must be at least 0 and below 1")
    if ON_CPU and any(arm.algorithm == "standalone" for arm in args.arms):
        parser.error("STANDALONE and its 4-bit kernels need CUDA; leave the standalone arm out")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    record = begin(args)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=count(args), desc="points") as bar:
        for arms in servers(args.arms):
            with start_server(arms, args, Path(scratch)) as server:
                bar.set_postfix_str(f"{server_name(arms)}, started in {server.start_s:.0f} s")
                measure(server, arms, args, record, bar)
    finish(args, record)
    return 0


def count(args: argparse.Namespace) -> int:
    """How many points there are."""
    return len(args.arms) * len(args.options) * len(args.concurrency)


def begin(args: argparse.Namespace) -> dict:
    """The record of a benchmark: what it is, and no point yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    return {
        "environment": environment(),
        "settings": {**vars(args), "arms": [str(arm) for arm in args.arms], "out": str(args.out)},
        "acceptance": stated_acceptance(args),
        "points": [],
    }


def measure(server: Server, arms: Sequence[Arm], args: argparse.Namespace, record: dict, bar: tqdm) -> None:
    """Append what `arms` do on their server; results.json has each point as soon as it is measured, profile.json the
    server's step times."""
    keep_profile(server, arms, args.out)
    for point in points(server, arms, args):
        record["points"].append(point)
        write_json(args.out / "results.json", record)
        bar.update()


def finish(args: argparse.Namespace, record: dict) -> None:
    """Table and plot."""
    order = [str(arm) for arm in args.arms]
    rows = sorted((point["row"] for point in record["points"]), key=lambda row: order.index(row["arm"]))
    text = table(against_first(rows))
    title = describe(args, record["environment"])
    (args.out / "table.md").write_text(f"{title}\n\n`{record['environment']['command']}`\n\n{text}\n")
    if not args.no_plot:
        report.plot_grid(args.out / "plot.png", rows, title)
    print(f"\n{title}\n\n{text}\n\nRaw data, table and plot: {args.out}/")


def against_first(rows: Sequence[dict]) -> list[dict]:
    """With a column more: tokens/s over that of the first arm."""
    first = rows[0]["arm"]
    base = {(row.get("options"), row["concurrency"]): row["tokens/s"] for row in rows if row["arm"] == first}
    return [{**row, f"x {first}": row["tokens/s"] / base[row.get("options"), row["concurrency"]]} for row in rows]


def describe(args: argparse.Namespace, environment: dict) -> str:
    hardware = environment["hardware"]
    return (
        f"{args.model} on {hardware.get('gpu', hardware['cpu'])}, context {args.context}, {args.output_tokens} output "
        f"tokens, {stated_acceptance(args)} acceptance"
    )


def stated_acceptance(args: argparse.Namespace) -> str:
    if args.model not in SHAPES:
        return "real"
    windows = "".join(f", x {factor} with window {window}" for window, factor in sorted(args.windows.items()))
    return f"stated {args.acceptance}{windows}"


def size(args: argparse.Namespace) -> tuple[int, int]:
    """Requests at once, and tokens of each, prompt and response."""
    return max(args.concurrency), args.context + args.output_tokens


def start_server(arms: Sequence[Arm], args: argparse.Namespace, scratch: Path) -> Server:
    """The server of `arms`, not yet entered."""
    from_shape, standalone = args.model in SHAPES, arms[0].algorithm == "standalone"
    model_path = write_model(scratch, args.model) if from_shape else args.model
    draft_path = write_model(scratch, args.model, quantized=True) if from_shape and standalone else None
    if standalone and not from_shape:
        raise SystemExit(
            "the standalone arm drafts with a dummy model of the same shape; with a checkpoint, leave it out"
        )
    flags = {
        **shared_args(*size(args)),
        **({} if from_shape else {"load-format": None}),
        "cuda-graph-bs": None if ON_CPU else sorted(args.concurrency),
        **server_args(arms, draft_path, idle_gamma=max([a.gamma or 0 for a in args.arms]) or 3),
    }
    return Server(
        model_path,
        flags,
        extra_words=args.server_args,
        env=server_env(arms, args.acceptance if from_shape else None, args.self_quant_config),
        log_path=args.out / f"server-{server_name(arms)}.log",
    )


def points(server: Server, arms: Sequence[Arm], args: argparse.Namespace) -> Iterator[dict]:
    """Yield one point per arm, options and concurrency: its table row, its repeats, and SELF_QUANT's counters over them."""
    info = server.get_server_info()
    vocab = SHAPES[args.model]["vocab_size"] if args.model in SHAPES else vocab_size(Path(args.model))
    prompts = random_prompts(max(args.concurrency), seed=SEED, tokens=args.context, vocab=vocab)

    def load(concurrency: int, tokens: int, description: str, options: str = "default") -> LoadResult:
        requests = [
            Request(
                prompt=p,
                max_new_tokens=tokens,
                ignore_eos=True,
                temperature=args.temperature,
                options=options,
                stream_interval=STREAM_INTERVAL_TOKENS,
            )
            for p in prompts[:concurrency]
        ]
        return run_load(
            server.base_url, requests, concurrency=concurrency, description=f"{description} at {concurrency}"
        )

    load(max(args.concurrency), WARM_UP_TOKENS, "warm-up")
    for arm in arms:
        if arm.self_quant:
            server.change_self_quant(arm.settings(args.acceptance if args.model in SHAPES else None, args.windows))
        for options, concurrency in product(args.options, args.concurrency):
            before = server.self_quant() if arm.self_quant else None
            load(concurrency, WARM_UP_TOKENS, str(arm), options)
            repeats = max(args.repeats, ceil(args.least_tokens / (concurrency * args.output_tokens)))
            results = [load(concurrency, args.output_tokens, str(arm), options) for _ in range(repeats)]
            after = server.self_quant() if arm.self_quant else None
            rates = [result.steady_tokens_per_s() for result in results]
            rate = median(rates)
            accept_length = median(result.accept_length for result in results)
            yield {
                "row": {
                    "arm": str(arm),
                    **({"options": options} if args.options != ["default"] else {}),
                    "concurrency": concurrency,
                    "tokens/s": rate,
                    "spread %": 100 * (max(rates) - min(rates)) / rate,
                    "step ms": 1000 * concurrency * accept_length / rate,
                    "accept length": accept_length,
                    "stated": arm.expected_accept_length(args.acceptance) if args.model in SHAPES else None,
                    "KV tokens": info["max_total_num_tokens"],
                },
                "tokens_per_s": rates,
                "windows_s": [result.steady_window_s() for result in results],
                "self_quant_before": before,
                "self_quant_after": after,
            }


def vocab_size(checkpoint: Path) -> int:
    return json.loads((checkpoint / "config.json").read_text())["vocab_size"]


if __name__ == "__main__":
    raise SystemExit(main())
