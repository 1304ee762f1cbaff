"""The toy's task: a chain of subtractions, right only if every link is.

    prompt "017:"    right "013,012,008,003,000"    wrong "013,012,018,003,000"

Each number must be 1 to 5 below the one before, down to zero. There are many right answers, so the policy
keeps choices to make. It is pre-trained for a few seconds on right chains, and then gets about four in ten right.
"""

import random

from er_sglang.bench import toy

SMALLEST, LARGEST = 5, 30

Prompt = list[dict[str, str]]
"""Chat messages, the last one the problem."""


def prompts(n: int, rng: random.Random) -> list[Prompt]:
    return [[{"role": "user", "content": toy.prompt(rng.randint(SMALLEST, LARGEST))}] for _ in range(n)]


def reward(prompt: Prompt, response: str, ended: bool) -> float:
    """1 for a chain whose every step is right and that ended, by its end-of-sequence token, else 0."""
    return float(toy.valid_steps(prompt[-1]["content"], response) == 1.0 and ended)
