"""Settings of the decision how many tokens to draft; what they do is told in decide.py."""

from __future__ import annotations

from dataclasses import dataclass

from er_sglang.errors import ConfigError
from er_sglang.policy.acceptance import AcceptanceEstimator

MODES = ("auto", "always", "off", "threshold", "paper", "cycle")
LADDER = (1, 2, 3, 5, 7, 11, 15)


def ladder_up_to(gamma_max: int) -> tuple[int, ...]:
    """Draft lengths that auto chooses from, unless it is told others."""
    return tuple(gamma for gamma in LADDER if gamma <= gamma_max)


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """Settings of the decision.

    mode: "auto"; "always"; "off"; "threshold"; "paper" (EfficientRollout's rule, a baseline); or "cycle", which takes
        the gammas of `cycle` in turn, one a step (for tests and experiments).
    ladder: draft lengths that auto chooses from, increasing, without 0.
    fixed_gamma: draft length of always and threshold.
    threshold_batch: mode threshold drafts at this many running requests or fewer.
    margin: auto drafts only if predicted at least this much faster than plain decoding.
    live_times: auto corrects the profile by the step times that it sees live.
    patience: steps' worth of tokens that auto lets a worse gamma cost before it leaves it.
    prior_alpha, prior_weight: acceptance assumed before any is seen, and how many tries that assumption is worth. Evidence
        that fades leaves it behind, so it should be what a drafter reaches: one that is thought worse is not gone back to.
    prior_window: the same of a narrower attention window, over that of the widest.
    half_life_cycles, stale_half_life_cycles: how fast evidence fades while drafting, and while not.
    update_keep: fraction of the evidence kept across a policy update, and when the server runs idle.
    probe_budget: largest fraction of the time spent off that probes may cost.
    probe_tokens: drafted tokens of one probe burst.
    confidence_z: standard deviations to the bound that probes are judged by.
    paper_ladder: draft lengths of mode paper.
    cycle: draft lengths of mode cycle, 0 included if wanted.
    """

    mode: str = "auto"
    ladder: tuple[int, ...] = ladder_up_to(7)
    fixed_gamma: int = 7
    threshold_batch: int = 16
    margin: float = 0.01
    live_times: bool = True
    patience: float = 0.25
    prior_alpha: float = 0.9
    prior_weight: float = 4.0
    prior_window: float = 0.97
    half_life_cycles: float = 24.0
    stale_half_life_cycles: float = 512.0
    update_keep: float = 0.5
    probe_budget: float = 0.005
    probe_tokens: int = 32
    confidence_z: float = 1.645
    paper_ladder: tuple[int, ...] = (5, 7, 9, 11)
    cycle: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode is {self.mode!r}; choose one of {', '.join(MODES)}.")
        for name in ("ladder", "paper_ladder"):
            rungs = getattr(self, name)
            if not rungs or rungs[0] < 1 or any(low >= high for low, high in zip(rungs, rungs[1:])):
                raise ConfigError(f"{name} is {list(rungs)}; it must be increasing and start at 1 or more.")
        if (self.mode == "cycle") != bool(self.cycle) or min(self.cycle, default=0) < 0:
            raise ConfigError("cycle lists the gammas of mode cycle, 0 or more: give both or neither.")
        for name in ("fixed_gamma", "threshold_batch", "probe_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("margin", "patience", "confidence_z"):
            if getattr(self, name) < 0.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative.")
        for name in ("probe_budget", "update_keep", "prior_window"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is a fraction from 0 to 1.")
        self.estimator(), self.estimator(narrower=True)  # validate the settings of acceptance

    @property
    def needs_profile(self) -> bool:
        """Whether the mode decides by measured times."""
        return self.mode in ("auto", "paper")

    @property
    def gammas(self) -> tuple[int, ...]:
        """Every gamma > 0 that a step can take, increasing: what the profile must cover and graphs are captured for."""
        if self.mode == "auto":
            return self.ladder
        if self.mode == "paper":
            return self.paper_ladder
        if self.mode == "cycle":
            return tuple(sorted({*self.cycle} - {0}))
        return () if self.mode == "off" else (self.fixed_gamma,)

    def estimator(self, *, narrower: bool = False) -> AcceptanceEstimator:
        """Of drafts with the widest attention window, or with a narrower one."""
        return AcceptanceEstimator(
            max(self.gammas, default=0),
            prior_alpha=self.prior_alpha * (self.prior_window if narrower else 1.0),
            prior_weight=self.prior_weight,
            half_life_cycles=self.half_life_cycles,
            stale_half_life_cycles=self.stale_half_life_cycles,
        )
