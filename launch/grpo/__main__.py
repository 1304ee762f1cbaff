"""`launch/grpo/run`: the same GRPO run with plain decoding, with SELF_QUANT, and with a drafter that never follows."""

import argparse
import dataclasses
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from er_sglang.bench.report import environment, table, write_json
from er_sglang.bench.serving import exit_on_sigterm
from launch.grpo import report, task
from launch.grpo.rollouts import GAMMA, RolloutServer
from launch.grpo.training import make_batch, train_step

DRAFT = {"policy": {"mode": "always"}}
ARMS: dict[str, Mapping | None] = {
    "plain": None,
    "self_quant": DRAFT,
    # The drafter of the base policy, for ever: what a server does that misses policy updates.
    "frozen drafter": {**DRAFT, "updates": {"refresh_interval": 1_000_000}},
}
LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    steps: int = 36
    prompts: int = 16
    group: int = 8

    @property
    def rollouts(self) -> int:
        """Per training step."""
        return self.prompts * self.group


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One training step. The drafter's fields are None, but `refreshes` 0, in a plain arm."""

    reward: float
    """Mean over the rollouts."""
    accepted: float | None
    """Accepted share of the drafted tokens."""
    accept_length: float | None
    """Mean tokens per request and cycle."""
    refreshes: int
    """Of the drafter, after this step's policy update."""
    rollout_s: float
    response_tokens: float
    """Mean over the rollouts."""
    max_log_ratio: float
    """Largest |ln(trainer's probability / server's)| of a sampled token, before the first optimiser step."""


def train(server: RolloutServer, base_policy: Path, settings: Settings, *, seed: int, bar: tqdm) -> list[StepRecord]:
    """One GRPO run. `seed` decides the prompts, which every arm gets alike; the server draws its own samples."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base_policy, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    server.update_policy(model)
    records = []
    for _ in range(settings.steps):
        prompts = [prompt for prompt in task.prompts(settings.prompts, rng) for _ in range(settings.group)]
        before = server.draft_counters()
        start_s = time.perf_counter()
        rollouts = server.sample(prompts, task.MAX_NEW_TOKENS)
        rollout_s = time.perf_counter() - start_s

        rewards_R = torch.tensor([task.reward(rollout) for rollout in rollouts])
        max_log_ratio = train_step(model, optimizer, make_batch(rollouts, rewards_R, settings.group))
        server.update_policy(model)

        counted = server.draft_counters().since(before)
        accepted = counted.accepted_tokens / counted.drafted_tokens if counted.drafted_tokens else None
        record = StepRecord(
            reward=rewards_R.mean().item(),
            accepted=accepted,
            accept_length=None if accepted is None else 1 + GAMMA * accepted,  # every cycle drafts GAMMA tokens
            refreshes=counted.refreshes,
            rollout_s=rollout_s,
            response_tokens=sum(len(rollout.response) for rollout in rollouts) / len(rollouts),
            max_log_ratio=max_log_ratio,
        )
        records.append(record)
        bar.set_postfix(reward=record.reward, accepted=record.accepted, refresh=False)
        bar.update()
    return records


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/grpo/run",
        description="Train a tiny policy by GRPO on a toy reasoning task, its rollouts sampled by a live SGLang server that gets the new "
        "weights after every step: with plain decoding, with SELF_QUANT, and with a drafter that is never refreshed. Several seeds each. "
        "Runs on the CPU, where it shows that learning is the same and acceptance holds, not that it is fast.",
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}; default all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each arm; default %(default)s")
    parser.add_argument("--steps", type=int, default=Settings().steps, metavar="N", help="training steps of a run; default %(default)s, about two minutes")
    parser.add_argument("--prompts", type=int, default=Settings().prompts, metavar="N", help="prompts a step; default %(default)s")
    parser.add_argument("--group", type=int, default=Settings().group, metavar="N", help="rollouts a prompt; default %(default)s")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "er_sglang", metavar="DIR", help="where the base policy is kept; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("grpo-results"), metavar="DIR", help="folder for table, plot, raw data and logs; default %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    exit_on_sigterm()
    torch.set_num_threads(1)  # matrices of 128 x 128, and the server is to have a core
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(steps=args.steps, prompts=args.prompts, group=args.group)
    base_policy = task.base_policy(args.cache)
    run_environment = environment()  # now: the checkout may change while it runs
    runs: report.Runs = {}
    with tqdm(total=len(args.arms) * args.seeds * settings.steps, desc="training steps", mininterval=1.0) as bar:
        for arm in args.arms:
            log_path = args.out / f"server-{arm.replace(' ', '-')}.log"
            with RolloutServer(base_policy, ARMS[arm], seed=0, max_rollouts=settings.rollouts, log_path=log_path) as server:
                runs[arm] = []
                for seed in range(args.seeds):
                    bar.set_description(f"{arm}, seed {seed}")
                    runs[arm].append(report.columns(train(server, base_policy, settings, seed=seed, bar=bar)))

    raw = {"environment": run_environment, "settings": dataclasses.asdict(settings), "gamma": GAMMA, "runs": runs}
    write_json(args.out / "results.json", raw)
    text = f"{table(report.rows(runs))}\n\n{report.comparison(runs)}\n"
    (args.out / "table.md").write_text(text)
    report.plot(args.out / "plot.png", runs)
    print(f"\n{text}\nplot, table, raw data and server logs: {args.out}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
