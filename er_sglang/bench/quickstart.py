"""`launch/quickstart`: make a small policy, serve it plain and with SELF_QUANT, and show what happened."""

import argparse
import dataclasses
import hashlib
import textwrap
from pathlib import Path

from er_sglang.bench import report, toy
from er_sglang.bench.arms import Arm, server_args, server_env
from er_sglang.bench.client import run_load
from er_sglang.bench.load import LoadResult, Request
from er_sglang.config import cache_folder
from er_sglang.tools import plots
from er_sglang.tools.serving import ON_CPU, Server, exit_on_sigterm

SEED = 7
MAX_NEW_TOKENS = 512
TEMPERATURE = 1.0

WHY_SLOWER = (
    "It was slower here. A drafter pays when its step is much cheaper than the policy's, and it is cheaper because it "
    "reads a quarter "
    "of the weight bytes. {where} What you see is that the real server drafts, verifies and keeps the policy's "
    "distribution; "
    "for speed, run launch/bench on a GPU with a model of billions of parameters."
)
WHERE_CPU = "On a CPU the int4 weights are unpacked by plain PyTorch, and this policy is a few megabytes: its time is all overhead."
WHERE_GPU = "This policy is a few megabytes: its time is all overhead, kernel launches, which int4 does not make fewer."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/quickstart",
        description="Train a small policy for a minute, serve it with SGLang, plain and then with SELF_QUANT, send the same burst "
        "of requests with long-tailed lengths to both, and print and plot what happened. Needs no GPU and no download "
        "of models.",
    )
    parser.add_argument(
        "--requests", type=int, default=48, metavar="N", help="requests in the burst; default %(default)s"
    )
    parser.add_argument(
        "--concurrency", type=int, default=16, metavar="C", help="requests at once; default %(default)s"
    )
    parser.add_argument("--gamma", type=int, default=3, metavar="G", help="drafted tokens a cycle; default %(default)s")
    parser.add_argument(
        "--train-steps",
        type=int,
        default=toy.TOY_STEPS,
        metavar="N",
        help="training steps of the policy; default %(default)s, about a minute",
    )
    parser.add_argument(
        "--cache", type=Path, default=cache_folder(), metavar="DIR", help="where policies are kept; default %(default)s"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("quickstart-results"),
        metavar="DIR",
        help="folder for plot, raw data and logs; default %(default)s",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    policy_path = cached_policy(args.cache, args.train_steps)
    print(f"policy: {policy_path}")
    requests = [
        Request(prompt=prompt, max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE)
        for prompt in toy.prompts(args.requests, seed=SEED)
    ]
    arms = [Arm.parse("plain"), Arm(algorithm="self_quant", gamma=args.gamma)]
    results, bins, rows, decisions = {}, {}, [], {}
    trace = args.out / "trace.jsonl"
    trace.unlink(missing_ok=True)
    for arm in arms:
        result, state = serve_and_load(policy_path, arm, requests, trace, args)
        results[str(arm)] = result
        rows.append(summary(arm, requests, result, state))
        if state is not None:
            decisions = state["decisions"]
            bins[str(arm)] = trace_bins(trace, result)

    environment = report.environment()
    plot_path = args.out / "timeline.png"
    report.plot_loads(
        plot_path,
        results,
        bins,
        f"{args.requests} countdowns, at most {args.concurrency} at once, temperature {TEMPERATURE:g}",
    )
    report.write_json(
        args.out / "results.json",
        {"environment": environment, "rows": rows, "decisions": decisions, "results": results},
    )

    example = results[str(arms[-1])].completions[0].text
    print(f"\nprompt {requests[0].prompt!r} -> {example[:60]!r}{'...' if len(example) > 60 else ''}\n")
    print(report.table(rows))
    print(f"\n{report.table([{'decision': name, 'steps': steps} for name, steps in decisions.items()])}\n")
    print(verdict(rows))
    print(f"\nplot: {plot_path}\nraw data, trace and server logs: {args.out}/")
    return 0


def cached_policy(cache: Path, steps: int) -> Path:
    """The toy policy, trained now unless this code has made it before."""
    key = hashlib.sha256(Path(toy.__file__).read_bytes() + str(steps).encode()).hexdigest()[:12]
    path = cache / f"toy-{key}"
    if not (path / "tokenizer.json").exists():  # written last
        toy.make_toy_policy(path, steps=steps)
    return path


def serve_and_load(
    policy_path: Path, arm: Arm, requests: list[Request], trace: Path, args: argparse.Namespace
) -> tuple[LoadResult, dict | None]:
    """The burst's result, and SELF_QUANT's counters over the burst (None for the plain arm)."""
    flags = {
        **({} if ON_CPU else {"dtype": "bfloat16"}),
        "random-seed": SEED,
        **server_args([arm], draft_path=None, idle_gamma=args.gamma),
    }
    log_path = args.out / f"server-{arm.algorithm}.log"
    with Server(
        policy_path,
        flags,
        env=server_env([arm], alpha=None, self_quant_config={"trace": str(trace)}),
        log_path=log_path,
    ) as server:
        print(f"{arm}: server up after {server.start_s:.0f} s")
        warm_up = [Request(prompt=request.prompt, max_new_tokens=8) for request in requests[: args.concurrency]]
        run_load(server.base_url, warm_up, concurrency=args.concurrency, description="warm-up")
        if arm.algorithm == "plain":
            return run_load(server.base_url, requests, concurrency=args.concurrency, description=str(arm)), None
        before = server.self_quant()
        result = run_load(server.base_url, requests, concurrency=args.concurrency, description=str(arm))
        return result, difference(before, server.self_quant())


def trace_bins(trace: Path, result: LoadResult) -> list[plots.Bin]:
    """The load's part of a server's trace; times are seconds since the load began."""
    steps = [step for step in plots.read_trace(trace) if step["time_s"] >= result.began_unix_s]
    first_s = steps[0]["time_s"] - result.began_unix_s
    return [
        dataclasses.replace(each, time_s=first_s + each.time_s) for each in plots.binned(steps, report.TIMELINE_BINS)
    ]


def difference(before: dict, after: dict) -> dict:
    """SELF_QUANT's counters between two snapshots."""
    counters = ("cycles", "decode_steps", "drafted_tokens", "accepted_tokens", "emitted_tokens")
    return {
        **{name: after[name] - before[name] for name in counters},
        "decisions": {
            name: steps - before["decisions"].get(name, 0)
            for name, steps in after["decisions"].items()
            if steps > before["decisions"].get(name, 0)
        },
    }


def summary(arm: Arm, requests: list[Request], result: LoadResult, state: dict | None) -> dict:
    valid = [toy.valid_steps(request.prompt, c.text) for request, c in zip(requests, result.completions)]
    return {
        "arm": str(arm),
        "tokens": result.total_tokens,
        "longest": max(c.total_tokens for c in result.completions),
        "seconds": result.wall_s,
        "tokens/s": result.tokens_per_s,
        "accepted": state["accepted_tokens"] / state["drafted_tokens"] if state and state["drafted_tokens"] else None,
        "accept length": result.accept_length,
        "legal steps": sum(valid) / len(valid),
    }


def verdict(rows: list[dict]) -> str:
    plain, self_quant = rows
    ratio = self_quant["tokens/s"] / plain["tokens/s"]
    sentence = f"SELF_QUANT ran at {ratio:.2f} x the tokens per second of plain decoding."
    if ratio < 1.0:
        sentence += " " + WHY_SLOWER.format(where=WHERE_CPU if ON_CPU else WHERE_GPU)
    return textwrap.fill(sentence, 100)


if __name__ == "__main__":
    raise SystemExit(main())
