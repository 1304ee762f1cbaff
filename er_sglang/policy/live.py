"""How far live step times are from the profile's: what options cost that it was not measured with, a hot or shared card.

Only cycles against plain steps matter to the decision, so one factor is learned: how much longer a cycle takes than the
profile says, over how much longer a plain step does. Evidence fades, so that a factor that stopped drafting is doubted
after a while, and the next cycles confirm or withdraw it.
"""

from __future__ import annotations

from math import exp, log

HALF_LIFE_STEPS = 512
PRIOR_STEPS = 8.0  # worth of belief in the profile
LARGEST_RATIO = 2.0  # of one step: the host pauses now and then


class LiveFactor:
    """Geometric means of measured over predicted seconds, of plain steps and of cycles."""

    def __init__(self) -> None:
        self._keep = 0.5 ** (1.0 / HALF_LIFE_STEPS)
        self._logs = [0.0, 0.0]  # of plain steps, of cycles
        self._steps = [0.0, 0.0]

    def observe(self, cycle: bool, predicted_s: float, took_s: float) -> None:
        """One step that followed another at once."""
        ratio = min(max(took_s / predicted_s, 1.0 / LARGEST_RATIO), LARGEST_RATIO)
        for kind in (False, True):
            self._logs[kind] *= self._keep
            self._steps[kind] *= self._keep
        self._logs[cycle] += log(ratio)
        self._steps[cycle] += 1.0

    @property
    def value(self) -> float:
        """Of a cycle's predicted seconds; 1 where nothing is known."""
        plain, cycle = (logs / (steps + PRIOR_STEPS) for logs, steps in zip(self._logs, self._steps))
        return exp(cycle - plain)
