"""The toy reasoning task: a chain of subtractions, right only if every link is.

    prompt "017:"    right "013,012,008,003,000"    wrong "013,012,018,003,000"

Each number must be 1 to 5 below the one before, down to zero. There are many right answers, so the policy
keeps choices to make. It is pre-trained for a few seconds on right chains, and then gets about four in ten right.
"""

import random
from pathlib import Path

from er_sglang.bench import toy
from er_sglang.bench.quickstart import cached_policy
from launch.grpo.rollouts import Rollout

PRETRAINING_STEPS = 150
SMALLEST, LARGEST = 5, 30
MAX_NEW_TOKENS = 96

TOKENIZER = toy.make_tokenizer(toy.TOY_SHAPE.vocab)


def base_policy(cache: Path) -> Path:
    """The checkpoint that every run starts from, made now unless `cache` has it."""
    return cached_policy(cache, PRETRAINING_STEPS)


def prompts(n: int, rng: random.Random) -> list[list[int]]:
    return [TOKENIZER.encode(toy.prompt(rng.randint(SMALLEST, LARGEST))) for _ in range(n)]


def reward(rollout: Rollout) -> float:
    """1 for a chain whose every step is right and that ends, else 0."""
    text = TOKENIZER.decode(rollout.response, skip_special_tokens=True)
    right = toy.valid_steps(TOKENIZER.decode(rollout.prompt), text) == 1.0
    return float(right and rollout.ended)
