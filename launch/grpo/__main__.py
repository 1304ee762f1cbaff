"""`launch/grpo/run`: the same GRPO run with plain decoding, with SELF_QUANT, and with a drafter that never follows."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from er_sglang.config import cache_folder
from er_sglang.tools.results import environment
from er_sglang.tools.serving import exit_on_sigterm
from launch.grpo import report, task
from launch.grpo.loop import Settings, train
from launch.grpo.rollouts import GAMMA, RolloutServer

DRAFT = {"policy": {"mode": "always"}}
ARMS: dict[str, Mapping | None] = {
    "plain": None,
    "self_quant": DRAFT,
    # The drafter of the base policy, for ever: what a server does that misses policy updates.
    "frozen drafter": {**DRAFT, "updates": {"refresh_interval": 1_000_000}},
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/grpo/run",
        description="Train a tiny policy by GRPO on a toy reasoning task, its rollouts sampled by a live SGLang server that gets the new "
        "weights after every step: with plain decoding, with SELF_QUANT, and with a drafter that is never refreshed. "
        "Takes about six minutes on two CPU cores, and four more for each further seed; lets you compare how the arms "
        "learn and what their drafts are "
        "accepted at, not how fast they are.",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="ARM",
        help=f"of {', '.join(map(repr, ARMS))}; default all",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each arm; default %(default)s")
    parser.add_argument(
        "--steps",
        type=int,
        default=Settings().steps,
        metavar="N",
        help="training steps of a run; default %(default)s, one to two minutes",
    )
    parser.add_argument(
        "--prompts", type=int, default=Settings().prompts, metavar="N", help="prompts a step; default %(default)s"
    )
    parser.add_argument(
        "--group",
        type=int,
        default=Settings().group,
        metavar="N",
        help="rollouts a prompt, at least 2; default %(default)s",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache_folder(),
        metavar="DIR",
        help="where the base policy is kept; default %(default)s",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("grpo-results"),
        metavar="DIR",
        help="folder for table, plot, raw data and logs; default %(default)s",
    )
    args = parser.parse_args(argv)
    if args.group < 2:
        parser.error("--group must be at least 2: GRPO judges a rollout against the others of its prompt")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    torch.set_num_threads(1)  # matrices of 128 x 128, and the server is to have a core
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(steps=args.steps, prompts=args.prompts, group=args.group)
    about = {"environment": environment(), "settings": dataclasses.asdict(settings), "gamma": GAMMA}
    base_policy = task.base_policy(args.cache)
    runs: report.Runs = {}
    with tqdm(total=len(args.arms) * args.seeds * settings.steps, desc="training steps", mininterval=1.0) as bar:
        for arm in args.arms:
            log_path = args.out / f"server-{arm.replace(' ', '-')}.log"
            with RolloutServer(
                base_policy, ARMS[arm], seed=0, max_rollouts=settings.rollouts, log_path=log_path
            ) as server:
                runs[arm] = []
                for seed in range(args.seeds):
                    bar.set_description(f"{arm}, seed {seed}")
                    runs[arm].append(report.columns(train(server, base_policy, settings, seed=seed, bar=bar)))

    print(f"\n{report.write(args.out, runs, about)}\nplot, table, raw data and server logs: {args.out}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
