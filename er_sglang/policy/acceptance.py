"""Live estimate of how many drafted tokens the target accepts.

    estimator = AcceptanceEstimator(gamma_max=7)
    estimator.observe(accepted=[3, 0, 5], gamma=5)   # one cycle of three requests
    emitted(estimator.alphas())[3]                   # expected tokens of a request in a cycle of gamma 3, bonus included

Per draft position i we count how often a draft was tried there (all earlier ones were accepted) and how often it was
kept; alpha_i = kept / tried is the conditional acceptance. Three rules keep the counts honest:

- Recent cycles count more: both counts decay by half every `half_life_cycles` cycles in which the position was drafted,
  and by half every `stale_half_life_cycles` otherwise. Decayed counts widen the bounds and let the estimate drift back
  to the prior.
- Evidence belongs to requests: when the batch shrinks, the share of the requests that left is forgotten. The last
  requests of a rollout accept least, and their own cycles must not be outvoted by those of the easy ones.
- Deep positions are reached rarely, so position i starts from the estimate of position i - 1 (position 0 from the
  prior), worth `prior_weight` tries.

Plain Python and deterministic: ranks that see the same counts hold the same estimate, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt


class AcceptanceEstimator:
    """Conditional acceptance per draft position, pooled over requests, with uncertainty.

    Raises ValueError on settings outside their range.
    """

    def __init__(
        self,
        gamma_max: int,
        *,
        prior_alpha: float = 0.8,
        prior_weight: float = 4.0,
        half_life_cycles: float = 24.0,
        stale_half_life_cycles: float = 512.0,
    ) -> None:
        if gamma_max < 0:
            raise ValueError(f"gamma_max must be at least 0, got {gamma_max}")
        if not 0.0 < prior_alpha < 1.0:
            raise ValueError(f"prior_alpha must lie between 0 and 1, got {prior_alpha}")
        if min(prior_weight, half_life_cycles, stale_half_life_cycles) <= 0.0:
            raise ValueError("prior_weight, half_life_cycles and stale_half_life_cycles must be positive")
        self.gamma_max = gamma_max
        self._prior_alpha = prior_alpha
        self._prior_weight = prior_weight
        self._fresh_keep = 0.5 ** (1.0 / half_life_cycles)
        self._stale_keep = 0.5 ** (1.0 / stale_half_life_cycles)
        self._tried = [0.0] * gamma_max
        self._kept = [0.0] * gamma_max
        self._batch = 0

    def observe(self, accepted: Sequence[int], gamma: int) -> None:
        """Count one cycle: accepted[r] in [0, gamma] drafts of request r were accepted.

        Raises ValueError if gamma or an entry is out of range: then the caller pairs a verdict with the wrong cycle.
        """
        batch = len(accepted)
        if not batch or not 0 < gamma <= self.gamma_max or min(accepted) < 0 or max(accepted) > gamma:
            raise ValueError(
                f"expected accepted counts in [0, gamma] and 0 < gamma <= {self.gamma_max}; "
                f"got gamma {gamma}, accepted {list(accepted)}"
            )
        stopped = [0] * (gamma + 1)
        for count in accepted:
            stopped[count] += 1
        stayed = min(1.0, batch / self._batch) if self._batch else 1.0
        self._batch = batch
        fresh_keep, stale_keep = self._fresh_keep * stayed, self._stale_keep * stayed
        reached = batch
        for i in range(gamma):
            passed = reached - stopped[i]
            self._tried[i] = self._tried[i] * fresh_keep + reached
            self._kept[i] = self._kept[i] * fresh_keep + passed
            reached = passed
        for i in range(gamma, self.gamma_max):
            self._tried[i] *= stale_keep
            self._kept[i] *= stale_keep

    def age(self) -> None:
        """Let a step without drafting pass: bounds widen, estimates drift back to the prior."""
        self._scale(self._stale_keep)

    def reset(self, keep: float) -> None:
        """After a policy update or an idle edge, keep this fraction of the evidence (0 forgets all)."""
        self._scale(keep)
        self._batch = 0

    def alphas(self) -> tuple[float, ...]:
        """Point estimates of alpha per position."""
        alphas, alpha, weight = [], self._prior_alpha, self._prior_weight
        for i in range(self.gamma_max):
            alpha = (self._kept[i] + weight * alpha) / (self._tried[i] + weight)
            alphas.append(alpha)
        return tuple(alphas)

    def bounds(self, z: float = 1.645) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Lower and upper alpha per position, `z` posterior standard deviations away (1.645: 95 % on each side)."""
        lower, upper = [], []
        for alpha, tried in zip(self.alphas(), self._tried):
            spread = z * sqrt(alpha * (1.0 - alpha) / (tried + self._prior_weight + 1.0))
            lower.append(max(0.0, alpha - spread))
            upper.append(min(1.0, alpha + spread))
        return tuple(lower), tuple(upper)

    def snapshot(self) -> dict[str, list[float]]:
        """For metrics and traces: estimates, bounds and the (decayed) number of tries behind them."""
        lower, upper = self.bounds()
        return {"alpha": list(self.alphas()), "lower": list(lower), "upper": list(upper), "tried": list(self._tried)}

    def _scale(self, factor: float) -> None:
        self._tried = [count * factor for count in self._tried]
        self._kept = [count * factor for count in self._kept]


def emitted(alphas: Sequence[float]) -> list[float]:
    """Expected emitted tokens for every gamma from 0 to len(alphas); for equal alphas (1 - a^(gamma+1)) / (1 - a)."""
    total, reach, totals = 1.0, 1.0, [1.0]
    for alpha in alphas:
        reach *= alpha
        total += reach
        totals.append(total)
    return totals
