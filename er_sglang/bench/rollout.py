"""Time whole rollouts, arm by arm, and set the simulator's prediction beside each."""

import argparse
import json
import shlex
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from er_sglang.bench import report
from er_sglang.bench.arms import Arm
from er_sglang.bench.client import run_load
from er_sglang.bench.load import Request, random_prompts
from er_sglang.bench.run import SEED, STREAM_INTERVAL_TOKENS, WARM_UP_TOKENS, arm_argument
from er_sglang.bench.serving import Server, exit_on_sigterm
from er_sglang.bench.shapes import SHAPES, write_model
from er_sglang.policy.decide import Controller
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.profile import Profile
from er_sglang.tools.simulate import simulate
from er_sglang.tools.workload import draw_lengths, make_requests

ON_CPU = not torch.cuda.is_available()

DESCRIPTION = """\
Send a rollout's requests at once and time it to the end of the last one. Lengths are long-tailed, drawn from a fixed
seed and exact (end-of-sequence is ignored), so every arm does the same work. The prompts are in the radix cache
beforehand: what is timed is decoding, from a full batch to the last request.
"""

EPILOG = """\
Models given by shape have random weights; acceptance is then stated, not measured: each drafted token is accepted with
probability --acceptance, given that those before it were. All computation is done, its verdict is replaced.

"predicted s" is what the simulator makes of the same lengths and acceptance with the server's own profile; an arm
without one (plain, self_quant:G) takes that of --profile.

examples
  python -m er_sglang.bench.rollout --model 14b --arms auto:7 --acceptance 0.9 --out auto
  python -m er_sglang.bench.rollout --model 14b --arms plain --profile auto/profile-auto-7.json --out plain
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.rollout",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", choices=SHAPES, default="tiny" if ON_CPU else "14b", help="a shape; default %(default)s")
    add("--arms", nargs="+", type=arm_argument, default=[Arm.parse("auto:7")], metavar="ARM", help="plain, self_quant:G, auto:G, paper:11; default auto:7")
    add("--requests", type=int, default=16 if ON_CPU else 128, metavar="N", help="all at once; default %(default)s")
    add("--lengths", default="lognormal:60:0.9:300" if ON_CPU else "lognormal:700:0.9:4096", help="as for `er-sglang simulate`; default %(default)s")
    add("--prompt-tokens", type=int, default=64, metavar="TOKENS", help="default %(default)s")
    add("--acceptance", type=float, default=0.9, metavar="A", help="stated acceptance per drafted token; default %(default)s")
    add("--rollouts", type=int, default=1, metavar="N", help="rollouts per arm, each with lengths of its own; default %(default)s")
    add("--profile", type=Path, help="step times for arms that measure none")
    add("--server-args", type=shlex.split, default=[], metavar="'--FLAG VALUE ...'", help="more flags for every server")
    add("--out", type=Path, default=Path("rollout-results"), metavar="DIR", help="results.json, table.md, profiles, traces and logs; default %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, states = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for arm in tqdm(args.arms, desc="arms"):
            with start_server(arm, args, Path(scratch)) as server:
                rows += measure_arm(server, arm, args)
                if arm.self_quant:
                    states[str(arm)] = server.self_quant()
    settings = {name: str(value) for name, value in vars(args).items()}
    report.write_json(
        args.out / "results.json",
        {"environment": report.environment(), "settings": settings, "rows": rows, "self_quant": states},
    )
    text = report.table(rows)
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    return 0


def start_server(arm: Arm, args: argparse.Namespace, scratch: Path) -> Server:
    name = str(arm).replace(":", "-")
    flags = {
        "skip-tokenizer-init": True,
        "random-seed": SEED,
        "max-running-requests": args.requests,
        "load-format": "dummy",
        **({} if ON_CPU else {"dtype": "bfloat16", "cuda-graph-backend-prefill": "disabled"}),
        **arm.args(None, idle_gamma=3),
    }
    return Server(
        write_model(scratch, args.model),
        flags,
        extra_words=args.server_args,
        env=arm.env(args.acceptance, {"trace": str((args.out / f"trace-{name}.jsonl").absolute())}),
        log_path=args.out / f"server-{name}.log",
    )


def measure_arm(server: Server, arm: Arm, args: argparse.Namespace) -> list[dict]:
    """A table row per rollout."""
    prompts = random_prompts(args.requests, seed=SEED, tokens=args.prompt_tokens, vocab=SHAPES[args.model]["vocab_size"])
    profile = Profile.read(args.profile) if args.profile else None
    if arm.self_quant and (path := server.self_quant()["profile"]):
        profile = Profile.load(path)
        profile.save(args.out / f"profile-{str(arm).replace(':', '-')}.json")

    def load(lengths: list[int]):
        requests = [
            Request(prompt=prompt, max_new_tokens=length, ignore_eos=True, stream_interval=STREAM_INTERVAL_TOKENS)
            for prompt, length in zip(prompts, lengths)
        ]
        return run_load(server.base_url, requests, concurrency=len(requests), description=str(arm))

    load([WARM_UP_TOKENS] * args.requests)
    rows = []
    for index in range(args.rollouts):
        lengths = draw_lengths(args.lengths, args.requests, seed=SEED + index)
        result = load(lengths)
        predicted = predict(arm, profile, lengths, args) if profile else None
        rows.append(
            {
                "arm": str(arm),
                "acceptance": args.acceptance if arm.drafts else None,
                "rollout s": result.wall_s,
                "predicted s": predicted,
                "tokens/s": result.tokens_per_s,
                "accept length": result.accept_length,
            }
        )
    return rows


def predict(arm: Arm, profile: Profile, lengths: list[int], args: argparse.Namespace) -> float:
    """Simulated seconds of a rollout."""
    gamma = arm.gamma or 1
    ladder = tuple(each for each in PolicyConfig().ladder if each <= gamma)
    mode = arm.policy_mode if arm.self_quant else "off"
    controller = Controller(PolicyConfig(mode=mode, ladder=ladder, fixed_gamma=gamma), profile)
    requests = make_requests(lengths, [args.acceptance] * gamma, prompt_tokens=args.prompt_tokens)
    return simulate(profile, requests, controller, seed=SEED).time_s


if __name__ == "__main__":
    raise SystemExit(main())
