"""How many tokens the next step drafts: what forbids drafting, else what the mode says."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

from er_sglang.config import SelfQuantConfig


@dataclass(frozen=True, slots=True)
class Decision:
    """gamma drafted tokens for the next step, and why, in a word or two of a small closed set."""

    gamma: int
    reason: str


class Decider:
    """The one place where a step's gamma is decided; every rank decides alike, from the same host data."""

    def __init__(self, config: SelfQuantConfig) -> None:
        self._config = config
        self._cycle = cycle(config.cycle)

    def decide(self, batch_size: int, blocker: str | None) -> Decision:
        """blocker: why this batch must not be drafted for, None if it may."""
        if blocker is not None:
            return Decision(0, blocker)
        if batch_size > self._config.max_draft_batch:
            return Decision(0, "batch-above-limit")
        if self._config.mode == "cycle":
            return Decision(next(self._cycle), "cycle")
        if self._config.mode == "off":
            return Decision(0, "off")
        return Decision(self._config.gamma_max, "always")
