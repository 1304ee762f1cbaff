"""Measure the speeds that the README states, on this card: one server, every workload."""

import argparse
import shlex
import tempfile
from pathlib import Path

from tqdm import tqdm

from er_sglang.bench import decode, rollout
from er_sglang.bench.arms import Arm, add_self_quant_config, server_args, server_env, shared_args
from er_sglang.bench.shapes import SHAPES, write_model
from er_sglang.config import DrafterConfig
from er_sglang.tools.serving import ON_CPU, Server, exit_on_sigterm

ACCEPTANCE = 0.93  # stated, and its share under a window: of Qwen2.5-Coder-0.5B in its own text, see launch/results
WINDOWS = {"attention": "128:0.961,256:0.987,512:0.998", "recency": "128:0.873,256:0.914,512:0.99"}
ARMS = [Arm.parse("self_quant:0"), Arm.parse("auto:7")]

WORKLOADS = {
    "decode": (decode, "--concurrency 1 8 16 32 48 64 96 128 --context 1024 --least-tokens 2048"),
    "options": (decode, "--concurrency 8 32 --context 1024 --options logprob top_p top_k min_p penalties all"),
    "rollout": (
        rollout,
        "--requests 128 --lengths lognormal:200:0.8:1000 --prompt-tokens 128 "
        "--options default logprob top_p top_k min_p penalties all",
    ),
    "long-tail": (rollout, "--requests 64 --lengths lognormal:400:1.2:8000 --prompt-tokens 128"),
    "long-context": (decode, "--concurrency 4 8 16 --context 8000 --least-tokens 2048"),
}
WORKLOADS_ON_CPU = {
    "decode": (decode, "--concurrency 1 4 --context 64 --output-tokens 32"),
    "rollout": (rollout, "--requests 8 --lengths lognormal:30:0.8:60"),
}


def _listed(workloads: dict) -> str:
    return "\n".join(f"  {name:13} {words}" for name, (_, words) in workloads.items())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    workloads = WORKLOADS_ON_CPU if ON_CPU else WORKLOADS
    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.readme",
        description="Measure the speeds that the README states: SELF_QUANT with default settings against the same server "
        "without drafting, with random weights and a stated acceptance. Each workload writes what launch/bench or "
        "`python -m er_sglang.bench.rollout` writes, into a folder of its name. All of the 14B should take some eleven "
        "minutes on an H100, once kernels are compiled (its parts, added up).",
        epilog=f"workloads\n{_listed(WORKLOADS)}\n\nworkloads without a GPU, to try it\n{_listed(WORKLOADS_ON_CPU)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="tiny" if ON_CPU else "14b", help="a shape; default %(default)s")
    add(
        "--only",
        nargs="+",
        choices=workloads,
        default=list(workloads),
        metavar="NAME",
        help="of the workloads below; default all",
    )
    add("--repeats", type=int, default=1, metavar="N", help="of decoding, and rollouts; default %(default)s")
    add_self_quant_config(parser)
    add("--server-args", type=shlex.split, default=[], metavar="'--FLAG VALUE ...'", help="more flags for the server")
    add(
        "--out",
        type=Path,
        default=Path("readme-results"),
        metavar="DIR",
        help="a folder in it for each workload; default %(default)s",
    )
    return parser.parse_args(argv)


def plan(args: argparse.Namespace) -> list[tuple]:
    """Each workload's benchmark, and its arguments."""
    planned = []
    rule = DrafterConfig(**args.self_quant_config.get("drafter", {})).window_by
    for name in args.only:
        benchmark, words = (WORKLOADS_ON_CPU if ON_CPU else WORKLOADS)[name]
        repeats = ["--repeats" if benchmark is decode else "--rollouts", str(args.repeats)]
        stated = ["--acceptance", str(ACCEPTANCE), "--windows", WINDOWS[rule]]
        common = ["--model", args.model, "--arms", *map(str, ARMS), *stated, *repeats, "--out", str(args.out / name)]
        planned.append((benchmark, benchmark.parse_args([*common, *words.split()])))
    return planned


def start_server(planned: list[tuple], args: argparse.Namespace, scratch: Path) -> Server:
    """A server for all of them, not yet entered."""
    trace = args.out / "trace.jsonl"
    trace.unlink(missing_ok=True)
    sizes = [benchmark.size(each) for benchmark, each in planned]
    flags = shared_args(max(requests for requests, _ in sizes), max(tokens for _, tokens in sizes))
    return Server(
        write_model(scratch, args.model),
        {**flags, **server_args(ARMS, None, idle_gamma=0)},
        extra_words=args.server_args,
        env=server_env(ARMS, ACCEPTANCE, {**args.self_quant_config, "trace": str(trace.absolute())}),
        log_path=args.out / "server.log",
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    planned = plan(args)
    records = [benchmark.begin(each) for benchmark, each in planned]
    total = sum(benchmark.count(each) for benchmark, each in planned)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=total, desc="measurements") as bar:
        with start_server(planned, args, Path(scratch)) as server:
            for (benchmark, each), record in zip(planned, records):
                bar.set_postfix_str(each.out.name)
                benchmark.measure(server, ARMS, each, record, bar)
    for (benchmark, each), record in zip(planned, records):
        benchmark.finish(each, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
