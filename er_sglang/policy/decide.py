"""Whether to draft in this step, how many tokens, and with which attention window: the rung with the most tokens per
second, by measurement.

    controller = Controller(config, profile, windows)
    decision = controller.decide(State(batch=16, mean_context_tokens=2048.0))    # every decode step
    controller.observe(accepted=[3, 0, ...], rung=decision.rung)               # after every cycle with gamma > 0
    controller.policy_updated()                                                # once after every policy update
    controller.idle()                                                          # when the last running request left

Mode "auto" scores each rung, a pair of gamma and window, with expected tokens per second,
emitted(gamma) / (gamma * T_draft(window) + T_verify(gamma)); plain decoding scores 1 / T_target. Acceptance is learned
for each window apart. Three things temper the choice:

- `margin`: drafting must be predicted this much faster than plain decoding.
- `patience`: the current rung is left only when staying is predicted to have cost this many steps' worth of tokens. A
  large advantage acts at once, a small one after a while, noise cancels; the number of switches over any stretch is at
  most (sum of predicted relative gains) / patience.
- Probes: acceptance of a window that is not drafted with goes stale, of every window while off. If its upper bound
  would pay, a short burst drafts with it anyway, with the quickest rung that could pay. Each cycle is charged the time
  it loses against the current rung at the lower bound of acceptance, to a credit that grows by `probe_budget` of the
  time spent and holds one burst at most. So probing costs at most `probe_budget` of throughput at the stated
  confidence, plus one burst per policy update.

`decide` is pure: same arguments, same result, to the last bit. Its arguments are host data equal on all ranks, so ranks
agree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import cycle
from math import ceil, inf

from er_sglang.errors import ConfigError
from er_sglang.policy.acceptance import AcceptanceEstimator, emitted
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.paper import PaperRule, fit_roofline
from er_sglang.policy.profile import PLAIN, Profile, Rung, widest_first


class Reason(str, Enum):
    """Why a step drafts as much as it does; one counter each."""

    OFF = "off"  # mode off
    ALWAYS = "always"  # mode always
    THRESHOLD = "threshold"  # mode threshold, on or off
    PAPER = "paper"  # mode paper, on or off
    CYCLE = "cycle"  # mode cycle
    BLOCKED = "blocked"  # the batch must not be drafted for; its blocker says why
    PAYS = "pays"  # auto: this rung has the best predicted speed
    SLOWER = "slower"  # auto: no rung is predicted faster than plain decoding
    HELD = "held"  # auto: another rung is predicted better, not yet by enough
    PROBE = "probe"  # auto: learning what acceptance is now with a window that is not drafted with


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a decision may depend on, equal on all ranks.

    batch: requests that decode in this step, at least 1.
    mean_context_tokens: their mean number of tokens in the KV cache.
    blocker: why this batch must not be drafted for (hidden states to return, say), or None.
    riding: requests of the batch that get one token a step whatever is drafted; fewer than `batch`.
    """

    batch: int
    mean_context_tokens: float
    blocker: str | None = None
    riding: int = 0

    @property
    def drafted_for(self) -> int:
        return self.batch - self.riding

    @property
    def drafted_share(self) -> float:
        return self.drafted_for / self.batch


@dataclass(frozen=True, slots=True)
class Decision:
    """How to take the step now; expected_speedup over plain decoding (None where the mode predicts nothing)."""

    rung: Rung
    reason: Reason
    expected_speedup: float | None = None
    outside: bool = False  # decided from extrapolated cells of the table

    @property
    def gamma(self) -> int:
        return self.rung.gamma

    @property
    def probe(self) -> bool:
        return self.reason is Reason.PROBE


@dataclass(frozen=True, slots=True)
class Memory:
    """What auto carries from step to step. The first burst is free: the credit is cut to one burst at first use.

    probing: the window of the burst under way.
    """

    rung: Rung = PLAIN
    regret: float = 0.0  # steps' worth of tokens that staying on the rung is predicted to have cost
    probe_credit_s: float = inf
    probe_cycles_left: int = 0
    probing: int = 0


def decide(
    state: State,
    profile: Profile,
    acceptance: Mapping[int, AcceptanceEstimator],
    config: PolicyConfig,
    memory: Memory,
    cycle_factor: float = 1.0,
) -> tuple[Decision, Memory]:
    """Mode auto, one step. acceptance: by the windows that a draft may have. cycle_factor: see live.py."""
    if state.blocker is not None:
        return Decision(PLAIN, Reason.BLOCKED), memory
    step_s, outside = profile.costs(state.batch, state.mean_context_tokens)
    step_s = {rung: seconds * cycle_factor if rung.gamma else seconds for rung, seconds in step_s.items()}

    windows = _distinct_windows(acceptance, state.mean_context_tokens)
    alphas = {window: acceptance[window].alphas() for window in windows}
    speedups = {PLAIN: 1.0, **predicted_speedups(alphas, config.ladder, step_s, state.drafted_share)}
    values = {rung: speedup / (1.0 + config.margin) if rung.gamma else 1.0 for rung, speedup in speedups.items()}
    best = max(values, key=values.__getitem__)
    current = memory.rung if memory.rung in values else memory.rung._replace(window=windows[0])
    if best == current:
        lead = values[best] / max(value for rung, value in values.items() if rung != best) - 1.0
        regret = max(0.0, memory.regret - lead)
    else:
        regret = memory.regret + values[best] / values[current] - 1.0
        if regret >= config.patience:
            current, regret = best, 0.0
    memory = replace(memory, rung=current, regret=regret)

    probe, memory = _probe(state, step_s, speedups, windows, acceptance, config, memory)
    if probe:
        return Decision(probe, Reason.PROBE, speedups[probe], outside), memory
    if current == best:
        reason = Reason.PAYS if current.gamma else Reason.SLOWER
    else:
        reason = Reason.HELD
    return Decision(current, reason, speedups[current], outside), memory


def _distinct_windows(windows: Collection[int], context_tokens: float) -> list[int]:
    """Those that leave something of the context out, and one that leaves out the least."""
    widest, *_ = widest_first(windows)
    return [window for window in windows if window == widest or window < context_tokens]


def predicted_speedups(
    alphas: Mapping[int, Sequence[float]],
    gammas: Collection[int],
    step_s: Mapping[Rung, float],
    drafted_share: float = 1.0,
) -> dict[Rung, float]:
    """Of each rung over plain decoding, in tokens per second.

    alphas: by window, per draft position, for the largest gamma. drafted_share: of the requests, those drafted for.
    """
    tokens, plain_s = {window: emitted(at) for window, at in alphas.items()}, step_s[PLAIN]
    return {
        rung: (1.0 + drafted_share * (tokens[rung.window][rung.gamma] - 1.0)) * plain_s / seconds
        for rung, seconds in step_s.items()
        if rung.gamma in gammas and rung.window in tokens
    }


def _probe(
    state: State,
    step_s: Mapping[Rung, float],
    speedups: Mapping[Rung, float],
    windows: Collection[int],
    acceptance: Mapping[int, AcceptanceEstimator],
    config: PolicyConfig,
    memory: Memory,
) -> tuple[Rung | None, Memory]:
    """The rung to probe with in this step, None to go on with the current one, and the credit left."""
    current = memory.rung
    bounds = {
        window: acceptance[window].bounds(config.confidence_z)
        for window in windows
        if not current.gamma or window != current.window
    }
    upper = {window: alphas for window, (_, alphas) in bounds.items()}
    wanted = speedups[current] * (1.0 + config.margin)
    optimistic = predicted_speedups(upper, config.ladder, step_s, state.drafted_share)
    promising = [rung for rung, speedup in optimistic.items() if speedup > wanted]
    credit_s, left = memory.probe_credit_s, memory.probe_cycles_left
    if promising:
        # Deeper positions borrow what the shallow ones teach. A burst stays with its window.
        begun = [rung for rung in promising if left and rung.window == memory.probing]
        rung = min(begun or promising, key=step_s.__getitem__)
        if not begun:
            left = 0
        lower, _ = bounds[rung.window]
        token_s = step_s[PLAIN] / speedups[current]  # of a request, as it is taken now
        emits = 1.0 + state.drafted_share * (emitted(lower[: rung.gamma])[rung.gamma] - 1.0)
        cost_s = max(0.0, step_s[rung] - emits * token_s)
        if not left:
            cycles = ceil(config.probe_tokens / (state.drafted_for * rung.gamma))
            left = cycles if credit_s >= cycles * cost_s else 0
            credit_s = min(credit_s, cycles * cost_s)
        if left and credit_s >= cost_s:
            memory = replace(memory, probe_credit_s=credit_s - cost_s, probe_cycles_left=left - 1, probing=rung.window)
            return rung, memory
    earned_s = config.probe_budget * step_s[current]
    return None, replace(memory, probe_credit_s=credit_s + earned_s, probe_cycles_left=0)


class Controller:
    """Decides each step in the configured mode and keeps what the decision needs.

    profile: required by auto and paper; must cover config.gammas, else ConfigError.
    windows: attention windows that auto chooses from; the other modes draft with the first.
    last_window: drafted with last.
    cycle_factor: how much longer cycles take, against plain steps, than the profile says; may be set at any time.
    """

    def __init__(self, config: PolicyConfig, profile: Profile | None = None, windows: Sequence[int] = (0,)) -> None:
        missing = set(config.gammas) - set(profile.gammas if profile else ())
        if missing and (profile or config.needs_profile):
            raise ConfigError(
                f"mode {config.mode!r} needs measured times of gamma {sorted(missing)}: run `er-sglang calibrate` "
                "for them, or choose other draft lengths."
            )
        if profile and (missing := set(windows) - set(profile.windows)):
            raise ConfigError(
                f"the profile has no times of attention window {sorted(missing)}: run `er-sglang calibrate` again, or "
                f"choose among {list(profile.windows)}."
            )
        self.config = config
        self.profile = profile
        self.windows = tuple(windows) if config.mode == "auto" else tuple(windows[:1])
        widest, *_ = widest_first(self.windows)
        self.acceptance = {window: config.estimator(narrower=window != widest) for window in self.windows}
        self._memory = Memory()
        self.last_window = self.windows[0]
        self.cycle_factor = 1.0
        ladder = config.paper_ladder
        roofline = fit_roofline(profile, ladder, windows[0]) if config.mode == "paper" else None
        self._paper = PaperRule(roofline, ladder) if roofline else None
        self._cycle = cycle(config.cycle)

    @property
    def first_acceptance(self) -> dict[int, float]:
        """Of the first drafted token, live, by window; 0 if the mode never drafts."""
        return {window: next(iter(each.alphas()), 0.0) for window, each in self.acceptance.items()}

    def decide(self, state: State) -> Decision:
        """How to take this step."""
        if self.config.mode == "auto":
            decision, self._memory = decide(
                state, self.profile, self.acceptance, self.config, self._memory, self.cycle_factor
            )
            for window, estimator in self.acceptance.items():
                if not decision.gamma or window != decision.rung.window:
                    estimator.age()
            return decision
        if self.config.mode == "off":
            return Decision(PLAIN, Reason.OFF)
        gamma, reason = self._rule(state)  # of every batch: the paper's toggle is armed by one too large to draft for
        if state.blocker is not None:
            return Decision(PLAIN, Reason.BLOCKED)
        return Decision(Rung(gamma, self.windows[0]) if gamma else PLAIN, reason)

    def _rule(self, state: State) -> tuple[int, Reason]:
        if self._paper:
            return self._paper.gamma(state.batch, state.mean_context_tokens), Reason.PAPER
        if self.config.mode == "cycle":
            return next(self._cycle), Reason.CYCLE
        if self.config.mode == "threshold" and state.batch > self.config.threshold_batch:
            return 0, Reason.THRESHOLD
        return self.config.fixed_gamma, Reason(self.config.mode)

    def observe(self, accepted: Sequence[int], rung: Rung) -> None:
        """Report a cycle: accepted[r] in [0, gamma] drafts of request r were accepted."""
        self.last_window = rung.window
        self.acceptance[rung.window].observe(accepted, rung.gamma)
        if self._paper:
            self._paper.observe(sum(accepted), len(accepted))

    def policy_updated(self) -> None:
        """The policy's weights changed: old acceptance says less, and a probe may be due. Call once per update."""
        self._memory = replace(self._memory, probe_credit_s=inf, probe_cycles_left=0)
        self._next_rollout()

    def idle(self) -> None:
        """The last running request left: what comes next is another rollout, whose requests may be easier or harder."""
        self._memory = replace(self._memory, regret=0.0, probe_cycles_left=0)
        self._next_rollout()

    def _next_rollout(self) -> None:
        for estimator in self.acceptance.values():
            estimator.reset(self.config.update_keep)
        if self._paper:
            self._paper.next_rollout()
