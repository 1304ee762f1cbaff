"""`launch/quickstart`: serve a small policy, plain and with SELF_QUANT, and show what happened."""

import argparse
import dataclasses
import hashlib
import json
import textwrap
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import AutoTokenizer

from er_sglang.bench import report, toy
from er_sglang.bench.arms import Arm, server_args, server_env, servers
from er_sglang.bench.client import run_load
from er_sglang.bench.load import LoadResult, Request
from er_sglang.bench.real import SOURCES, group_size, real_policy
from er_sglang.config import cache_folder
from er_sglang.offline.texts import BUILT_IN
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile
from er_sglang.tools import plots
from er_sglang.tools.results import environment, table, write_json
from er_sglang.tools.serving import ON_CPU, Server, exit_on_sigterm
from er_sglang.tools.simulator import simulate
from er_sglang.tools.workload import draw_lengths, make_requests

SEED = 7
TEMPERATURE = 1.0
TOY_TOKENS, CHAT_TOKENS = 512, 96  # the longest response
GPU_PROFILE = Path(__file__).with_name("14b-h100.json")  # of launch/results, which is not installed
GPU_LOAD = "lognormal:1000:0.9:8192"

WHY_SLOWER = (
    "Drafting in every step was slower here. A drafter pays when its step is much cheaper than the policy's, and it is "
    "cheaper because it reads a quarter of the weight bytes. {where} What you see is that the real server drafts, verifies "
    "and keeps the policy's distribution; for speed, run launch/bench on a GPU with a model of billions of parameters. "
)
WHY_SLOWER_PLAIN = (
    " On a CPU the host work of a speculative server adds to every step, drafting or not; on an H200 plain steps of a 7B "
    "and a 14B took at most 0.6 % longer with it (launch/results, an earlier version)."
)
WHERE_CPU = "On a CPU the int4 weights are unpacked by plain PyTorch, which takes longer than to read them whole."
WHERE_GPU = "This policy is small: its time is all overhead, kernel launches, which int4 does not make fewer."


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/quickstart",
        description="Train a small policy for a minute, or fetch a real chat model, serve it with SGLang, plain and then with "
        "SELF_QUANT, drafting in every step and as its policy decides, send the same burst of requests to each, with responses "
        "as long as those of plain decoding, and print and plot what happened. Needs no GPU.",
    )
    parser.add_argument(
        "--policy",
        choices=("toy", *SOURCES),
        default="toy",
        help="toy, trained now on a task of its own, or a real chat model that third parties uploaded to PyPI (0.1 to 1.1 GB); default %(default)s",
    )
    parser.add_argument(
        "--requests", type=int, metavar="N", help="requests in the burst; default 192, of a real chat model 8"
    )
    parser.add_argument(
        "--concurrency", type=int, metavar="C", help="requests at once; default 16, of a real chat model 4"
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
    is_toy = args.policy == "toy"
    args.requests = args.requests or (192 if is_toy else 8)
    args.concurrency = args.concurrency or (16 if is_toy else 4)
    policy_path = cached_policy(args.cache, args.train_steps) if is_toy else real_policy(args.policy, args.cache)
    print(f"policy: {policy_path}")
    requests = [
        Request(prompt=prompt, max_new_tokens=TOY_TOKENS if is_toy else CHAT_TOKENS, temperature=TEMPERATURE)
        for prompt in (toy.prompts(args.requests, seed=SEED) if is_toy else chat_prompts(policy_path, args.requests))
    ]
    arms = [Arm.parse("plain"), Arm(algorithm="self_quant", gamma=args.gamma), Arm(algorithm="auto", gamma=args.gamma)]
    results, bins, rows, decisions, alphas = {}, {}, [], {}, ()
    trace = args.out / "trace.jsonl"
    trace.unlink(missing_ok=True)
    for served in servers(arms):
        with serve(policy_path, served, trace, args) as server:
            print(f"{', '.join(map(str, served))}: server up after {server.start_s:.0f} s")
            warm_up = [Request(prompt=request.prompt, max_new_tokens=8) for request in requests[: args.concurrency]]
            run_load(server.base_url, warm_up, concurrency=args.concurrency, description="warm-up")
            for arm in served:
                result, state = load(server, arm, requests, args)
                results[str(arm)] = result
                rows.append(summary(arm, result, state))
                # The other arms' responses are as long as those of plain decoding: equal work, whatever each samples.
                requests = as_long_as(requests, result)
                if state is None:
                    continue
                decisions[str(arm)] = state["decisions"]
                bins[str(arm)] = trace_bins(trace, result, arm.policy["mode"])
                if arm.algorithm == "self_quant":
                    alphas = state["alphas"]
            if served[0].self_quant and not is_toy:
                stream(server, requests[0])

    plot_path = args.out / "timeline.png"
    report.plot_loads(
        plot_path,
        results,
        bins,
        f"{args.requests} {'countdowns' if is_toy else 'chats'}, at most {args.concurrency} at once, temperature {TEMPERATURE:g}",
    )
    write_json(
        args.out / "results.json",
        {"environment": environment(), "rows": rows, "decisions": decisions, "results": results},
    )

    if is_toy:
        example = results[str(arms[0])].completions[0].text
        print(f"\nprompt {requests[0].prompt!r} -> {example[:60]!r}{'...' if len(example) > 60 else ''}")
    print(f"\n{table(rows)}\n")
    steps = [{"arm": arm, "decision": name, "steps": n} for arm, each in decisions.items() for name, n in each.items()]
    print(f"{table(steps)}\n")
    print(verdict(rows, decisions[str(arms[-1])]))
    print(f"\n{on_a_gpu(alphas)}")
    print(f"\nplot: {plot_path}\nraw data, trace and server logs: {args.out}/")
    return 0


def cached_policy(cache: Path, steps: int) -> Path:
    """The toy policy, trained now unless this code has made it before."""
    key = hashlib.sha256(Path(toy.__file__).read_bytes() + str(steps).encode()).hexdigest()[:12]
    path = cache / f"toy-{key}"
    if not (path / "tokenizer.json").exists():  # written last
        toy.make_toy_policy(path, steps=steps)
    return path


def chat_prompts(policy_path: Path, count: int) -> list[str]:
    """The first built-in prompts of `er-sglang acceptance`, over and over, in the policy's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(policy_path)
    messages = ([{"role": "user", "content": BUILT_IN[i % len(BUILT_IN)]}] for i in range(count))
    return [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in messages]


def serve(policy_path: Path, arms: Sequence[Arm], trace: Path, args: argparse.Namespace) -> Server:
    flags = {
        **({} if ON_CPU else {"dtype": "bfloat16"}),
        "random-seed": SEED,
        **server_args(arms, draft_path=None, idle_gamma=args.gamma),
    }
    config = {"trace": str(trace)}
    if args.policy != "toy":
        config["drafter"] = {"group_size": group_size(policy_path)}
    log_path = args.out / f"server-{arms[0].algorithm}.log"
    return Server(policy_path, flags, env=server_env(arms, alpha=None, self_quant_config=config), log_path=log_path)


def load(server: Server, arm: Arm, requests: list[Request], args: argparse.Namespace) -> tuple[LoadResult, dict | None]:
    """The burst's result, and SELF_QUANT's counters over the burst (None for the plain arm)."""
    if arm.algorithm == "plain":
        return run_load(server.base_url, requests, concurrency=args.concurrency, description=str(arm)), None
    server.change_self_quant(arm.settings(None))
    before = server.self_quant()
    result = run_load(server.base_url, requests, concurrency=args.concurrency, description=str(arm))
    return result, difference(before, server.self_quant())


def as_long_as(requests: list[Request], result: LoadResult) -> list[Request]:
    """The requests, each for exactly as many tokens as it had in `result`."""
    return [
        dataclasses.replace(request, max_new_tokens=completion.total_tokens, ignore_eos=True)
        for request, completion in zip(requests, result.completions)
    ]


def stream(server: Server, request: Request) -> None:
    """Print a response as it comes, a drafted cycle at a time."""
    question = request.prompt.rpartition("user\n")[2].partition("<|im_end|>")[0]
    print(f"\n> {question}")
    body = {"text": request.prompt, "sampling_params": request.sampling_params, "stream": True}
    post = urllib.request.Request(
        server.base_url + "/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    shown = 0
    with urllib.request.urlopen(post) as response:
        for line in response:
            if line.startswith(b"data: {"):
                text = json.loads(line.removeprefix(b"data: "))["text"]
                print(text[shown:], end="", flush=True)
                shown = len(text)
    print()


def trace_bins(trace: Path, result: LoadResult, mode: str) -> list[plots.Bin]:
    """The load's part of a server's trace, in a policy mode; times are seconds since the load began."""
    steps = [step for step in plots.read_trace(trace) if step["time_s"] >= result.began_unix_s and step["mode"] == mode]
    first_s = steps[0]["time_s"] - result.began_unix_s
    return [
        dataclasses.replace(each, time_s=first_s + each.time_s) for each in plots.binned(steps, report.TIMELINE_BINS)
    ]


def difference(before: dict, after: dict) -> dict:
    """SELF_QUANT's counters between two snapshots; alphas: conditional acceptance per draft position until the second."""
    counters = ("cycles", "decode_steps", "drafted_tokens", "accepted_tokens", "emitted_tokens")
    return {
        **{name: after[name] - before[name] for name in counters},
        "alphas": [alpha for alpha in after["acceptance_per_position"] if alpha is not None],
        "decisions": {
            name: steps - before["decisions"].get(name, 0)
            for name, steps in after["decisions"].items()
            if steps > before["decisions"].get(name, 0)
        },
    }


def summary(arm: Arm, result: LoadResult, state: dict | None) -> dict:
    return {
        "arm": str(arm),
        "tokens": result.total_tokens,
        "longest": max(c.total_tokens for c in result.completions),
        "seconds": result.wall_s,
        "tokens/s": result.tokens_per_s,
        "accepted": state["accepted_tokens"] / state["drafted_tokens"] if state and state["drafted_tokens"] else None,
        "accept length": result.accept_length,
    }


def verdict(rows: list[dict], auto_steps: Mapping[str, int]) -> str:
    """auto_steps: of mode auto, by decision."""
    plain, always, auto = (row["tokens/s"] for row in rows)
    sentence = f"Mode auto, which servers run by default, ran at {auto / plain:.2f} x the tokens per second of plain decoding. "
    if always < plain:
        sentence += WHY_SLOWER.format(where=WHERE_CPU if ON_CPU else WHERE_GPU)
    plain_steps = sum(count for decision, count in auto_steps.items() if decision.startswith("gamma=0:"))
    sentence += f"Mode auto took {plain_steps} of its {sum(auto_steps.values())} steps without drafting."
    if auto < plain and ON_CPU:
        sentence += WHY_SLOWER_PLAIN
    return textwrap.fill(sentence, 100)


def on_a_gpu(alphas: Sequence[float]) -> str:
    """What the shipped step times of a GPU make of the acceptance seen here."""
    profile = Profile.read(GPU_PROFILE)
    times_s = {}
    for mode in ("off", "auto"):
        controller = Controller(PolicyConfig(mode=mode, ladder=profile.gammas), profile)
        requests = make_requests(draw_lengths(GPU_LOAD, 64, seed=SEED), alphas)
        times_s[mode] = simulate(profile, requests, controller, seed=SEED).time_s
    return textwrap.fill(
        f"Predicted from the measured step times of a 14B on an {profile.fingerprint['device']}: with the acceptance seen here "
        f"({', '.join(f'{alpha:.2f}' for alpha in alphas)} by draft position), a rollout of 64 long-tailed requests takes "
        f"{times_s['off']:.0f} s plainly and {times_s['auto']:.0f} s with SELF_QUANT, "
        f"{times_s['off'] / times_s['auto']:.2f} x the speed. `er-sglang acceptance` measures your policy's acceptance, and "
        f"`er-sglang simulate` what it brings.",
        100,
    )


if __name__ == "__main__":
    raise SystemExit(main())
