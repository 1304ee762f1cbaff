"""EfficientRollout's rule (arXiv 2606.18967), a baseline: a roofline toggle, one-way per rollout, and a draft ladder.

The cost model is the published one. With B requests of mean context S,

    T_target = max(M, C) + c_target * B          M       = weights + kv * B * S        (time to read memory)
    T_draft  = max(M_draft, C) + c_draft * B     M_draft = draft_weights + kv * B * S
    T_verify = max(M, (gamma + 1) * C) + c_verify * B        C = compute * B           (time to compute)

in seconds. The seven constants minimise the mean squared logarithmic error of measured points. (The authors measure the
compute rate apart, add attention's share to C, and weigh in the error of the speed-up.)

The toggle starts off, is armed once more than 32 requests run (so that a filling batch does not trip it), turns on when
the predicted speed-up reaches 1.05, and stays on until the next rollout. Its accept length is the last rollout's; at
first, and after a change of gamma, it is gamma. Between rollouts gamma goes one rung up after two rollouts that
accepted 0.94 of the drafts or more, one rung down after two with 0.85 or less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from math import exp, log

from er_sglang.policy.profile import Profile

MARGIN = 0.05
ARM_ABOVE_BATCH = 32
RAISE_AT = 0.94
LOWER_AT = 0.85
ROLLOUTS_TO_MOVE = 2


@dataclass(frozen=True, slots=True)
class Roofline:
    """Constants of the cost model, in seconds: per step, per request and context token (kv), per request (others)."""

    weights_s: float
    draft_weights_s: float
    kv_s: float
    compute_s: float
    target_overhead_s: float
    draft_overhead_s: float
    verify_overhead_s: float

    def target(self, batch: float, context: float) -> float:
        return (
            max(self.weights_s + self.kv_s * batch * context, self.compute_s * batch) + self.target_overhead_s * batch
        )

    def draft(self, batch: float, context: float) -> float:
        return (
            max(self.draft_weights_s + self.kv_s * batch * context, self.compute_s * batch)
            + self.draft_overhead_s * batch
        )

    def verify(self, batch: float, context: float, gamma: int) -> float:
        memory_s = self.weights_s + self.kv_s * batch * context
        return max(memory_s, (gamma + 1) * self.compute_s * batch) + self.verify_overhead_s * batch

    def speedup(self, batch: float, context: float, gamma: int, accept_length: float) -> float:
        cycle_s = gamma * self.draft(batch, context) + self.verify(batch, context, gamma)
        return accept_length * self.target(batch, context) / cycle_s


def fit_roofline(profile: Profile, gammas: Sequence[int], window: int = 0) -> Roofline:
    """Fit to the measured cells of `profile`: target, draft with `window`, and the largest and smallest verify of
    `gammas`."""
    cells = [
        (batch, context)
        for batch in profile.batches
        for context in profile.contexts_tokens
        if (batch, context) not in profile.unavailable
    ]
    ends = sorted({min(gammas), max(gammas)})
    points: list[tuple[Callable[[Roofline], float], float]] = []
    for b, c in cells:
        points.append((lambda line, b=b, c=c: line.target(b, c), log(profile.target_s(b, c))))
        points.append((lambda line, b=b, c=c: line.draft(b, c), log(profile.drafted_token_s(b, c, window))))
        for gamma in ends:
            points.append((lambda line, b=b, c=c, g=gamma: line.verify(b, c, g), log(profile.verify_s(b, c, gamma))))

    def loss(logs: Sequence[float]) -> float:
        line = Roofline(*map(exp, logs))
        return sum((log(predict(line)) - measured) ** 2 for predict, measured in points)

    b, c = cells[0]
    weights_s, draft_s, last_b = profile.target_s(b, c), profile.drafted_token_s(b, c, window), cells[-1][0]
    slope_s = profile.verify_s(last_b, c, ends[-1]) / last_b
    start = Roofline(
        weights_s,
        draft_s,
        1e-3 * weights_s / c,
        slope_s / (2 * ends[-1] + 2),
        1e-2 * weights_s,
        1e-2 * draft_s,
        slope_s / 4,
    )
    return Roofline(*map(exp, _descend(loss, [log(value) for value in astuple(start)])))


def _descend(loss: Callable[[Sequence[float]], float], point: list[float]) -> list[float]:
    """Pattern search: a step along each coordinate, halved when none helps. Deterministic, no dependency."""
    best, step = loss(point), 0.5
    while step > 2e-3:
        improved = False
        for i in range(len(point)):
            for direction in (step, -step):
                trial = [*point]
                trial[i] += direction
                if (value := loss(trial)) < best * (1.0 - 1e-6):
                    point, best, improved = trial, value, True
                    break
        if not improved:
            step /= 2.0
    return point


class PaperRule:
    """State of the rule: the toggle within a rollout, the rung across rollouts."""

    def __init__(self, roofline: Roofline, ladder: Sequence[int]) -> None:
        self._roofline = roofline
        self._ladder = tuple(ladder)
        self._rung = 0
        self._accept_length = float(ladder[0])
        self._above = self._below = 0  # consecutive rollouts beyond either bound
        self._armed = self._on = False
        self._accepted = self._requests = 0

    def gamma(self, batch: int, mean_context_tokens: float) -> int:
        """The draft length of this step, 0 before the toggle."""
        gamma = self._ladder[self._rung]
        if not self._on and self._armed:
            self._on = self._roofline.speedup(batch, mean_context_tokens, gamma, self._accept_length) >= 1.0 + MARGIN
        self._armed = self._armed or batch > ARM_ABOVE_BATCH
        return gamma if self._on else 0

    def observe(self, accepted: int, requests: int) -> None:
        """One cycle in which `requests` requests accepted `accepted` drafts in all."""
        self._accepted += accepted
        self._requests += requests

    def next_rollout(self) -> None:
        """Turn the toggle off; move the rung by the rollout that ended, unless it never drafted."""
        self._armed = self._on = False
        if not self._requests:
            return
        mean_accepted = self._accepted / self._requests
        rate = mean_accepted / self._ladder[self._rung]
        self._accepted = self._requests = 0
        self._accept_length = 1.0 + mean_accepted
        self._above = self._above + 1 if rate >= RAISE_AT else 0
        self._below = self._below + 1 if rate <= LOWER_AT else 0
        move = (self._above >= ROLLOUTS_TO_MOVE) - (self._below >= ROLLOUTS_TO_MOVE)
        rung = min(max(self._rung + move, 0), len(self._ladder) - 1)
        if move:
            self._above = self._below = 0
        if rung != self._rung:
            self._rung = rung
            self._accept_length = float(self._ladder[rung])
