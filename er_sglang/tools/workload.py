"""What a simulated rollout consists of: requests, their lengths, and how well they are drafted for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from er_sglang.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A conversation to simulate.

    arrival_s: when it arrives.
    turns: tokens to generate in each turn. Between turns the request is away for turn_wait_s and returns with
    turn_prompt_tokens more.
    alphas: true conditional acceptance per draft position; the last one holds for all deeper positions.
    """

    prompt_tokens: int
    turns: tuple[int, ...]
    alphas: tuple[float, ...]
    turn_prompt_tokens: int = 0
    turn_wait_s: float = 0.0
    arrival_s: float = 0.0

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or not self.turns or min(self.turns) < 1:
            raise ConfigError("a request needs a prompt and at least one token to generate in each turn")
        if not self.alphas or not all(0.0 <= alpha <= 1.0 for alpha in self.alphas):
            raise ConfigError(f"acceptance must be one or more numbers from 0 to 1, got {self.alphas}")


def draw_lengths(text: str, count: int, seed: int) -> list[int]:
    """`count` lengths: "fixed:N", "uniform:LOW:HIGH", "lognormal:MEDIAN:SIGMA:MAX", or a file with one per line.

    Raises ConfigError for anything else, OSError for a file that cannot be read.
    """
    rng = random.Random(seed)
    kind, *numbers = text.split(":")
    try:
        if kind == "fixed":
            (length,) = map(float, numbers)
            return [int(length)] * count
        if kind == "uniform":
            low, high = map(float, numbers)
            return [rng.randint(int(low), int(high)) for _ in range(count)]
        if kind == "lognormal":
            median, sigma, most = map(float, numbers)
            return [max(1, min(int(most), int(median * rng.lognormvariate(0.0, sigma)))) for _ in range(count)]
        lengths = [int(line) for line in Path(text).read_text().split()]
        return [lengths[i % len(lengths)] for i in range(count)]
    except (ValueError, ZeroDivisionError) as error:  # of an empty file
        raise ConfigError(
            f"{text!r} holds no lengths: write fixed:N, uniform:LOW:HIGH, lognormal:MEDIAN:SIGMA:MAX, or a file with one "
            "length per line."
        ) from error


def make_requests(
    lengths: Sequence[int],
    alphas: Sequence[float],
    *,
    tail_alpha: float | None = None,
    prompt_tokens: int = 512,
    turns: int = 1,
    turn_prompt_tokens: int = 0,
    turn_wait_s: float = 0.0,
    arrival_s: float = 0.0,
) -> list[Request]:
    """One request per length, split into `turns`; they arrive evenly over `arrival_s`.

    tail_alpha: acceptance of the longest; it falls with length.
    """
    longest = max(lengths)
    drop = 0.0 if tail_alpha is None else 1.0 - tail_alpha / alphas[0]
    return [
        Request(
            prompt_tokens=prompt_tokens,
            turns=(max(1, length // turns),) * turns,
            alphas=tuple(alpha * (1.0 - drop * length / longest) for alpha in alphas),
            turn_prompt_tokens=turn_prompt_tokens,
            turn_wait_s=turn_wait_s,
            arrival_s=arrival_s * index / len(lengths),
        )
        for index, length in enumerate(lengths)
    ]
