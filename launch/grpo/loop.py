"""The RL loop: sample, judge, train, send the new policy; again."""

import math
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoTokenizer

from launch.grpo.place import Place
from launch.grpo.rollouts import RolloutServer
from launch.grpo.training import Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of a run. A step takes `prompts` prompts, and `group` rollouts of each."""

    steps: int
    prompts: int
    group: int
    max_new_tokens: int
    learning_rate: float

    @property
    def rollouts(self) -> int:
        """Per training step."""
        return self.prompts * self.group


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One training step. The drafter's fields are None, but `refreshes` 0, in a plain arm; of those on acceptance, where
    nothing was drafted, too; of those on memory, on a CPU."""

    reward: float
    """Mean over the rollouts."""
    rollout_s: float
    sleep_s: float
    """Until the server has given back its memory."""
    train_s: float
    update_s: float
    """Until the server has memory, the new weights, and a drafter of them."""
    refresh_ms: float | None
    """Of it, the drafter's latest re-quantizing."""
    refreshes: int
    """Of the drafter, after this step's policy update."""
    accepted: float | None
    """Accepted share of the drafted tokens."""
    accept_length: float | None
    """Mean tokens per request and decode step, steps without drafts included."""
    drafting: float | None
    """Share of the decode steps that drafted."""
    response_tokens: float
    """Mean over the rollouts."""
    response_tokens_p90: int
    response_tokens_max: int
    tokens_per_s: float
    """Response tokens over rollout_s."""
    max_log_ratio: float
    """Largest |ln(trainer's probability / server's)| of a sampled token, before the first optimiser step."""
    mean_log_ratio: float
    server_gb: float | None
    """Of the card, while it samples; contexts of both processes included."""
    sleeping_server_gb: float | None
    trainer_gb: float | None
    """Of the card, at its most."""


def train(
    server: RolloutServer, checkpoint: Path, task: ModuleType, place: Place, settings: Settings, *, seed: int
) -> Iterator[StepRecord]:
    """One GRPO run, step by step. `seed` decides the prompts, which every arm gets alike; the server draws its own
    samples."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    trainer = Trainer(checkpoint, place, settings.learning_rate)
    server.sleep(forget=True)
    server.update_policy(trainer.weights())
    for _ in range(settings.steps):
        prompts = [prompt for prompt in task.prompts(settings.prompts, rng) for _ in range(settings.group)]
        inputs = [tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False) for p in prompts]
        counters, seconds = server.draft_counters(), Stopwatch()

        with seconds.of("rollout"):
            rollouts = server.sample(inputs, settings.max_new_tokens)
        responses = [tokenizer.decode(rollout.response, skip_special_tokens=True) for rollout in rollouts]
        rewards_R = torch.tensor(list(map(task.reward, prompts, responses, [r.ended for r in rollouts])))
        awake = place.used_gb()
        with seconds.of("sleep"):
            server.sleep()
        with seconds.of("train"):
            off_policy_N = trainer.step(rollouts, rewards_R, settings.group)
        asleep = place.used_gb()
        with seconds.of("update"):
            server.update_policy(trainer.weights())

        drafts = server.draft_counters().since(counters)
        lengths = sorted(len(rollout.response) for rollout in rollouts)
        yield StepRecord(
            reward=rewards_R.mean().item(),
            **{f"{what}_s": value for what, value in seconds.items()},
            refresh_ms=1e3 * drafts.refresh_s if drafts.refreshes else None,
            refreshes=drafts.refreshes,
            accepted=drafts.accepted,
            accept_length=drafts.accept_length,
            drafting=drafts.drafting,
            response_tokens=statistics.fmean(lengths),
            response_tokens_p90=lengths[math.ceil(0.9 * len(lengths)) - 1],
            response_tokens_max=lengths[-1],
            tokens_per_s=sum(lengths) / seconds["rollout"],
            max_log_ratio=off_policy_N.max().item(),
            mean_log_ratio=off_policy_N.mean().item(),
            server_gb=awake and awake.others,
            sleeping_server_gb=asleep and asleep.others,
            trainer_gb=asleep and asleep.trainer,
        )


class Stopwatch(dict[str, float]):
    """Seconds by what took them."""

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        start_s = time.perf_counter()
        yield
        self[what] = time.perf_counter() - start_s
