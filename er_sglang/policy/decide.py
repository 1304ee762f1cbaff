"""How many tokens to draft in this step: the ladder rung with the most tokens per second, by measurement.

    controller = Controller(config, profile)
    decision = controller.decide(State(batch=16, mean_context_tokens=2048.0))    # every decode step
    controller.observe(accepted=[3, 0, ...], gamma=decision.gamma)               # after every cycle with gamma > 0
    controller.policy_updated()                                                # once after every policy update
    controller.idle()                                                          # when the last running request left

Mode "auto" scores each rung with expected tokens per second, emitted(gamma) / (gamma * T_draft + T_verify(gamma));
gamma 0 scores 1 / T_target. Three things temper the choice:

- `margin`: drafting must be predicted this much faster than plain decoding.
- `patience`: the current gamma is left only when staying is predicted to have cost this many steps' worth of tokens. A
  large advantage acts at once, a small one after a while, noise cancels; the number of switches over any stretch is at
  most (sum of predicted relative gains) / patience.
- Probes: while off, acceptance goes stale. If its upper bound would pay, a short burst drafts anyway, with the shortest
  gamma that could pay. Each cycle is charged the time it loses at the lower bound of acceptance, to a credit that grows
  by `probe_budget` of the time spent off and holds one burst at most. So probing costs at most `probe_budget` of
  throughput at the stated confidence, plus one burst per policy update.

`decide` is pure: same arguments, same result, to the last bit. Its arguments are host data equal on all ranks, so ranks
agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import cycle
from math import ceil, inf

from er_sglang.errors import ConfigError
from er_sglang.policy.acceptance import AcceptanceEstimator, emitted
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.paper import PaperRule, fit_roofline
from er_sglang.policy.profile import Profile


class Reason(str, Enum):
    """Why a step drafts as much as it does; one counter each."""

    OFF = "off"  # mode off
    ALWAYS = "always"  # mode always
    THRESHOLD = "threshold"  # mode threshold, on or off
    PAPER = "paper"  # mode paper, on or off
    CYCLE = "cycle"  # mode cycle
    FORBIDDEN = "forbidden"  # a request of the batch must not be drafted for
    PAYS = "pays"  # auto: this gamma has the best predicted speed
    SLOWER = "slower"  # auto: no gamma is predicted faster than plain decoding
    HELD = "held"  # auto: another gamma is predicted better, not yet by enough
    PROBE = "probe"  # auto: off, and learning whether acceptance has changed


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a decision may depend on, equal on all ranks.

    batch: requests that decode in this step, at least 1.
    mean_context_tokens: their mean number of tokens in the KV cache.
    forbid_reason: why this batch must not be drafted for (a grammar, say), or None.
    """

    batch: int
    mean_context_tokens: float
    forbid_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """gamma to draft now; expected_speedup over plain decoding (None where the mode predicts nothing)."""

    gamma: int
    reason: Reason
    expected_speedup: float | None = None
    outside: bool = False  # decided from extrapolated cells of the table

    @property
    def probe(self) -> bool:
        return self.reason is Reason.PROBE


@dataclass(frozen=True, slots=True)
class Memory:
    """What auto carries from step to step. The first burst is free: the credit is cut to one burst at first use."""

    gamma: int = 0
    regret: float = 0.0  # steps' worth of tokens that staying at gamma is predicted to have cost
    probe_credit_s: float = inf
    probe_cycles_left: int = 0


def decide(
    state: State, profile: Profile, acceptance: AcceptanceEstimator, config: PolicyConfig, memory: Memory
) -> tuple[Decision, Memory]:
    """Mode auto, one step."""
    if state.forbid_reason is not None:
        return Decision(0, Reason.FORBIDDEN), memory
    step_s, outside = profile.costs(state.batch, state.mean_context_tokens)

    speedups = predicted_speedups(acceptance.alphas(), config.ladder, step_s)
    values = {gamma: speedup / (1.0 + config.margin) for gamma, speedup in speedups.items()}
    speedups[0] = values[0] = 1.0
    best = max(values, key=values.__getitem__)
    current = max(gamma for gamma in values if gamma <= memory.gamma)
    if best == current:
        lead = values[best] / max(value for gamma, value in values.items() if gamma != best) - 1.0
        regret = max(0.0, memory.regret - lead)
    else:
        regret = memory.regret + values[best] / values[current] - 1.0
        if regret >= config.patience:
            current, regret = best, 0.0
    memory = Memory(current, regret, memory.probe_credit_s, 0 if current else memory.probe_cycles_left)

    if current:
        reason = Reason.PAYS if current == best else Reason.HELD
        return Decision(current, reason, speedups[current], outside), memory
    gamma, memory = _probe(state.batch, step_s, acceptance, config, memory)
    if gamma:
        return Decision(gamma, Reason.PROBE, speedups[gamma], outside), memory
    return Decision(0, Reason.SLOWER if best == 0 else Reason.HELD, 1.0, outside), memory


def predicted_speedups(alphas: Sequence[float], gammas: Sequence[int], step_s: dict[int, float]) -> dict[int, float]:
    """Of each gamma over plain decoding, in tokens per second; alphas: per draft position, for the largest gamma."""
    tokens = emitted(alphas)
    return {gamma: tokens[gamma] * step_s[0] / step_s[gamma] for gamma in gammas}


def _probe(
    batch: int,
    step_s: dict[int, float],
    acceptance: AcceptanceEstimator,
    config: PolicyConfig,
    memory: Memory,
) -> tuple[int, Memory]:
    """gamma to probe with in a step that would be off (0: do not), and the credit left."""
    lower, upper = acceptance.bounds(config.confidence_z)
    optimistic = predicted_speedups(upper, config.ladder, step_s)
    promising = [gamma for gamma, speedup in optimistic.items() if speedup > 1.0 + config.margin]
    credit_s, left = memory.probe_credit_s, memory.probe_cycles_left
    if promising:
        gamma = min(promising, key=step_s.__getitem__)  # deeper positions borrow what the shallow ones teach
        cost_s = max(0.0, step_s[gamma] - emitted(lower[:gamma])[gamma] * step_s[0])
        if not left:
            cycles = ceil(config.probe_tokens / (batch * gamma))
            left = cycles if credit_s >= cycles * cost_s else 0
            credit_s = min(credit_s, cycles * cost_s)
        if left and credit_s >= cost_s:
            return gamma, Memory(memory.gamma, memory.regret, credit_s - cost_s, left - 1)
    return 0, Memory(memory.gamma, memory.regret, credit_s + config.probe_budget * step_s[0], 0)


class Controller:
    """Decides each step in the configured mode and keeps what the decision needs.

    profile: required by auto and paper; must cover config.gammas, else ConfigError.
    """

    def __init__(self, config: PolicyConfig, profile: Profile | None = None) -> None:
        missing = set(config.gammas) - set(profile.gammas if profile else ())
        if missing and (profile or config.needs_profile):
            raise ConfigError(
                f"mode {config.mode!r} needs measured times of gamma {sorted(missing)}: run `er-sglang calibrate` "
                "for them, or choose other draft lengths."
            )
        self.config = config
        self.profile = profile
        self.acceptance = config.estimator()
        self._memory = Memory()
        ladder = config.paper_ladder
        self._paper = PaperRule(fit_roofline(profile, ladder), ladder) if config.mode == "paper" else None
        self._cycle = cycle(config.cycle)

    def decide(self, state: State) -> Decision:
        """The draft length of this step."""
        if self.config.mode == "auto":
            decision, self._memory = decide(state, self.profile, self.acceptance, self.config, self._memory)
            if not decision.gamma:
                self.acceptance.age()
            return decision
        if self.config.mode == "off":
            return Decision(0, Reason.OFF)
        gamma, reason = self._rule(state)  # of every batch: the paper's toggle is armed by one too large to draft for
        return Decision(0, Reason.FORBIDDEN) if state.forbid_reason is not None else Decision(gamma, reason)

    def _rule(self, state: State) -> tuple[int, Reason]:
        if self._paper:
            return self._paper.gamma(state.batch, state.mean_context_tokens), Reason.PAPER
        if self.config.mode == "cycle":
            return next(self._cycle), Reason.CYCLE
        if self.config.mode == "threshold" and state.batch > self.config.threshold_batch:
            return 0, Reason.THRESHOLD
        return self.config.fixed_gamma, Reason(self.config.mode)

    def observe(self, accepted: Sequence[int], gamma: int) -> None:
        """Report a cycle: accepted[r] in [0, gamma] drafts of request r were accepted."""
        self.acceptance.observe(accepted, gamma)
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
        self.acceptance.reset(self.config.update_keep)
        if self._paper:
            self._paper.next_rollout()
