"""Time whole rollouts, arm by arm, and set the simulator's prediction beside each."""

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from tqdm import tqdm

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
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile
from er_sglang.steering.trace import read_steps
from er_sglang.tools import plots
from er_sglang.tools.results import environment, table, write_json
from er_sglang.tools.serving import ON_CPU, Server, exit_on_sigterm
from er_sglang.tools.simulator import simulate
from er_sglang.tools.workload import draw_lengths, make_requests

DESCRIPTION = """\
Send a rollout's requests at once and time it to the end of the last one. Lengths are long-tailed, drawn from a fixed
seed and exact (end-of-sequence is ignored), so every arm does the same work. The prompts are in the radix cache
beforehand: what is timed is decoding, from a full batch to the last request.
The SELF_QUANT arms share one server, which is switched between them and between acceptances; plain has its own.
"""

EPILOG = f"""\
{ARMS}
Models given by shape have random weights; acceptance is then stated, not measured: each drafted token is accepted with
probability --acceptance, given that those before it were. All computation is done, its verdict is replaced. An arm that
drafts is run at every --acceptance, one that does not (plain, self_quant:0) once.

"x plain" is the time of the same rollout in the first arm, which is plain by default, over this one. "predicted s" is
what the simulator makes of the same lengths and acceptance with the server's own profile, or that of --profile.

examples
  python -m er_sglang.bench.rollout --model 14b --arms plain self_quant:3 paper:11 auto:7 --acceptance 0.6 0.8 0.9 0.95
  python -m er_sglang.bench.rollout --model 14b --arms plain --profile rollout-results/profile.json --out plain
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.rollout",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default_arms = [Arm.parse("plain"), Arm.parse("auto:7")]
    add("--model", choices=SHAPES, default="tiny" if ON_CPU else "14b", help="a shape; default %(default)s")
    add(
        "--arms",
        nargs="+",
        type=arm_argument,
        default=default_arms,
        metavar="ARM",
        help="see below, without standalone; default plain auto:7",
    )
    add("--requests", type=int, default=16 if ON_CPU else 128, metavar="N", help="all at once; default %(default)s")
    add(
        "--lengths",
        default="lognormal:60:0.9:300" if ON_CPU else "lognormal:350:0.8:1600",
        help="as for `er-sglang simulate`; default %(default)s",
    )
    add("--prompt-tokens", type=int, default=64, metavar="TOKENS", help="default %(default)s")
    add(
        "--acceptance",
        nargs="+",
        type=float,
        default=[0.9],
        metavar="A",
        help="stated acceptance per drafted token; default 0.9",
    )
    add_server_arguments(parser)
    add(
        "--rollouts",
        type=int,
        default=1,
        metavar="N",
        help="rollouts in a row per arm and acceptance, each with lengths of its own; default %(default)s",
    )
    add("--profile", type=Path, help="step times to predict by, where no server measures them")
    add(
        "--out",
        type=Path,
        default=Path("rollout-results"),
        metavar="DIR",
        help="results.json, table.md, profile, traces, plots and logs; default %(default)s",
    )
    add("--no-plot", action="store_true", help="do without matplotlib")
    args = parser.parse_args(argv)
    if any(arm.algorithm == "standalone" for arm in args.arms):
        parser.error("STANDALONE is measured by launch/bench; leave the standalone arm out")
    if not all(0.0 <= alpha <= 1.0 for alpha in args.acceptance):
        parser.error(f"--acceptance is {args.acceptance}; give numbers from 0 to 1")
    if not args.no_plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("the plots need matplotlib: pip install '.[plot]' in this checkout, or give --no-plot")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    record = begin(args)
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=count(args), desc="rollouts") as bar:
        for arms in servers(args.arms):
            with start_server(arms, args, Path(scratch)) as server:
                bar.set_postfix_str(f"{server_name(arms)}, started in {server.start_s:.0f} s")
                measure(server, arms, args, record, bar)
    finish(args, record)
    return 0


def begin(args: argparse.Namespace) -> dict:
    """The record of a benchmark: what it is, and no run yet."""
    args.out.mkdir(parents=True, exist_ok=True)
    arms, profile = [str(arm) for arm in args.arms], args.profile and str(args.profile)
    settings = {**vars(args), "arms": arms, "profile": profile, "out": str(args.out)}
    return {"environment": environment(), "settings": settings, "rows": [], "runs": []}


def measure(server: Server, arms: Sequence[Arm], args: argparse.Namespace, record: dict, bar: tqdm) -> None:
    """Append what `arms` do on their server, which traces its steps. Kept beside results.json, which has each run as soon
    as it is measured: the server's profile, and the steps by arm."""
    keep_profile(server, arms, args.out)
    measured = []
    for run in runs(server, arms, args):
        measured.append(run)
        record["runs"].append(run)
        write_json(args.out / "results.json", record)
        bar.update()
    if arms[0].self_quant:
        split_trace(Path(server.self_quant()["trace"]), args.out, measured)


def finish(args: argparse.Namespace, record: dict) -> None:
    """Table with predictions, and a timeline for each arm."""
    own = args.out / "profile.json"
    profile = Profile.read(own) if own.exists() else Profile.read(args.profile) if args.profile else None
    record["rows"] = rows = table_rows(record["runs"], profile, args)
    write_json(args.out / "results.json", record)
    text = table(rows)
    (args.out / "table.md").write_text(text + "\n")
    if not args.no_plot:
        for trace in tqdm(sorted(args.out.glob("trace-*.jsonl")), desc="plots"):
            steps = plots.read_trace(trace)
            plots.plot_timeline(
                plots.binned(steps, min(plots.BINS, len(steps) // 2)), trace.stem, trace.with_suffix(".png")
            )
    print(f"\n{text}\n\nRaw data, table and traces: {args.out}/")


def acceptances(arm: Arm, args: argparse.Namespace) -> Sequence[float | None]:
    """What to state for an arm, in turn; None for one that does not draft."""
    return args.acceptance if arm.drafts else [None]


def count(args: argparse.Namespace) -> int:
    """How many runs there are."""
    return args.rollouts * len(args.options) * sum(len(acceptances(arm, args)) for arm in args.arms)


def lengths_of(index: int, args: argparse.Namespace) -> list[int]:
    """Response lengths of one rollout, equal for all arms."""
    return draw_lengths(args.lengths, args.requests, seed=SEED + index)


def size(args: argparse.Namespace) -> tuple[int, int]:
    """Requests at once, and tokens of the longest, prompt and response."""
    return args.requests, args.prompt_tokens + max(max(lengths_of(index, args)) for index in range(args.rollouts))


def start_server(arms: Sequence[Arm], args: argparse.Namespace, scratch: Path) -> Server:
    """The server of `arms`, not yet entered."""
    flags = {**shared_args(*size(args)), **server_args(arms, None, idle_gamma=3)}
    trace = args.out / "trace.jsonl"
    trace.unlink(missing_ok=True)
    return Server(
        write_model(scratch, args.model),
        flags,
        extra_words=args.server_args,
        env=server_env(arms, args.acceptance[0], {**args.self_quant_config, "trace": str(trace.absolute())}),
        log_path=args.out / f"server-{server_name(arms)}.log",
    )


def runs(server: Server, arms: Sequence[Arm], args: argparse.Namespace) -> Iterator[dict]:
    """Yield a run per arm, acceptance, options and rollout."""
    prompts = random_prompts(
        args.requests, seed=SEED, tokens=args.prompt_tokens, vocab=SHAPES[args.model]["vocab_size"]
    )

    def load(lengths: list[int], description: str, options: str = "default") -> LoadResult:
        requests = [
            Request(
                prompt=prompt,
                max_new_tokens=length,
                ignore_eos=True,
                options=options,
                stream_interval=STREAM_INTERVAL_TOKENS,
            )
            for prompt, length in zip(prompts, lengths)
        ]
        return run_load(server.base_url, requests, concurrency=len(requests), description=description)

    for options in args.options:  # SGLang compiles some of its samplers at first use, for a minute and a half
        load([WARM_UP_TOKENS] * args.requests, "warm-up", options)
    for arm in arms:
        for alpha, options in product(acceptances(arm, args), args.options):
            if arm.self_quant:
                server.change_self_quant(arm.settings(alpha, args.windows))
            for index in range(args.rollouts):
                before = server.self_quant() if arm.self_quant else None
                result = load(lengths_of(index, args), str(arm) if alpha is None else f"{arm} at {alpha}", options)
                yield {
                    "arm": str(arm),
                    "acceptance": alpha,
                    "options": options,
                    "rollout": index,
                    "wall_s": result.wall_s,
                    "tokens_per_s": result.tokens_per_s,
                    "accept_length": result.accept_length,
                    "by_running": by_running(result),
                    "ends_s": [completion.end_s for completion in result.completions],
                    "self_quant_before": before,
                    "self_quant_after": server.self_quant() if arm.self_quant else None,
                }


def by_running(result: LoadResult) -> list[dict]:
    """Speed by the number of requests that decode, from the moment the last one has its first token on.

    In classes up to 1, 2, 4, 8, ... requests: single sizes last too shortly to be timed by chunks that arrive here.
    """
    begin_s = max(c.times_s[0] for c in result.completions)
    ends_s = sorted({c.end_s for c in result.completions if c.end_s > begin_s})
    stretches: dict[int, list[float]] = {}
    received = result.tokens_at(begin_s)
    for end_s in ends_s:
        up_to, total = 1 << (result.running_at(begin_s) - 1).bit_length(), result.tokens_at(end_s)
        stretch = stretches.setdefault(up_to, [0.0, 0.0])
        stretch[0] += end_s - begin_s
        stretch[1] += total - received
        begin_s, received = end_s, total
    return [
        {"running_up_to": up_to, "seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}
        for up_to, (seconds, tokens) in stretches.items()
    ]


def split_trace(trace: Path, folder: Path, runs: Sequence[dict]) -> list[Path]:
    """Of a server's trace, the steps of these runs as one file per arm, acceptance and options, in `folder`."""
    names = {
        run["self_quant_after"]["settings_version"]: f"trace-{run['arm'].replace(':', '-')}"
        + ("" if run["acceptance"] is None else f"-{run['acceptance']}")
        + ("" if run["options"] == "default" else f"-{run['options']}")
        for run in runs
        if run["self_quant_after"]
    }
    lines: dict[int, list[str]] = {change: [] for change in names}
    for step in read_steps(trace.read_text().splitlines()):
        lines.get(step["settings_version"], []).append(json.dumps(step) + "\n")  # the warm-up's belong to no arm
    paths = []
    for change, name in names.items():
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("".join(lines[change]))
    return paths


def table_rows(runs: Sequence[dict], profile: Profile | None, args: argparse.Namespace) -> list[dict]:
    """A row per run, in the order in which the arms were asked for."""
    order = [str(arm) for arm in args.arms]
    first_s = {
        (run["acceptance"], run["options"], run["rollout"]): run["wall_s"] for run in runs if run["arm"] == order[0]
    }
    rows = []
    for run in tqdm(sorted(runs, key=lambda run: order.index(run["arm"])), desc="predicting"):
        acceptance = run["acceptance"] if args.arms[0].drafts else None  # of the first arm's run to compare with
        baseline_s = first_s.get((acceptance, run["options"], run["rollout"]))
        rows.append(
            {
                "arm": run["arm"],
                "acceptance": run["acceptance"],
                "options": run["options"],
                "rollout s": run["wall_s"],
                f"x {order[0]}": baseline_s / run["wall_s"] if baseline_s else None,
                "predicted s": predict(run, profile, args) if profile else None,
                "tokens/s": run["tokens_per_s"],
                "accept length": run["accept_length"],
            }
        )
    return rows


def predict(run: dict, profile: Profile, args: argparse.Namespace) -> float | None:
    """Simulated seconds of a run, None if the profile lacks its gammas. An arm's rollouts after its first one are taken
    to begin as that did."""
    arm = Arm.parse(run["arm"])
    config = arm.policy_config if arm.self_quant else PolicyConfig(mode="off")
    if not set(config.gammas) <= set(profile.gammas):
        return None
    alpha = 0.0 if run["acceptance"] is None else run["acceptance"]
    requests = make_requests(lengths_of(run["rollout"], args), [alpha], prompt_tokens=args.prompt_tokens)
    controller = Controller(config, profile, profile.windows)
    return simulate(profile, requests, controller, window_acceptance=args.windows, seed=SEED).time_s


if __name__ == "__main__":
    raise SystemExit(main())
