"""The RL loop: sample, judge, train, send the new policy; again."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from launch.grpo import task
from launch.grpo.rollouts import GAMMA, RolloutServer
from launch.grpo.training import make_batch, train_step

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    steps: int = 30
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
