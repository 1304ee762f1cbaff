"""A rollout, simulated with the step times of a profile: what it takes in each policy mode.

The simulated server is a decode loop with the profile's step times, at most `max_running` requests, and a prefill that
stalls it (instant by default). How hard a token is to draft is drawn once per request and position, so all modes face
the same tokens. A synchronous batch is requests that all run at once; a refilled pool is more requests than
`max_running`, or requests that arrive one by one; multi-turn requests leave the batch between turns.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from er_sglang.policy.decide import Controller, State
from er_sglang.policy.profile import PLAIN, Profile
from er_sglang.tools.workload import Request


@dataclass(slots=True)
class Rollout:
    """What one simulated rollout took.

    cycles: requests x steps that drafted. probe_excess_s: what probe cycles took beyond plain steps for as many tokens.
    steps: number of decode steps by (gamma, reason). timeline: (time_s, batch, gamma) after each step.
    """

    time_s: float = 0.0
    tokens: int = 0
    cycles: int = 0
    accepted: int = 0
    switches: int = 0
    probe_excess_s: float = 0.0
    steps: Counter[tuple[int, str]] = field(default_factory=Counter)
    timeline: list[tuple[float, int, int]] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        total = sum(self.steps.values())
        by_gamma: Counter[int] = Counter()
        by_reason: Counter[str] = Counter()
        for (gamma, reason), count in self.steps.items():
            by_gamma[gamma] += count
            by_reason[reason] += count
        return {
            "time_s": self.time_s,
            "tokens_per_s": self.tokens / self.time_s,
            "drafting_share": 1.0 - by_gamma[0] / total,
            "accept_length": 1.0 + self.accepted / self.cycles if self.cycles else None,
            "switches": self.switches,
            "probe_excess_s": self.probe_excess_s,
            "steps_by_gamma": dict(sorted(by_gamma.items())),
            "steps_by_reason": dict(sorted(by_reason.items())),
        }


class _Slot:
    """A request on its way: tokens left in this turn, in the KV cache, and to prefill before it (re)joins.

    hardness: of each token to generate, from 0 to 1; a draft of it is accepted if alpha is larger. generated: so far.
    """

    __slots__ = ("context_tokens", "generated", "hardness", "index", "left", "prefill_tokens", "request", "turn")

    def __init__(self, index: int, request: Request, rng: random.Random) -> None:
        self.index, self.request, self.turn, self.left = index, request, 0, request.turns[0]
        self.context_tokens, self.prefill_tokens = 0, request.prompt_tokens
        self.hardness, self.generated = [rng.random() for _ in range(sum(request.turns))], 0


def simulate(
    profile: Profile,
    requests: Sequence[Request],
    controller: Controller,
    *,
    max_running: int = 1 << 30,
    prefill_tokens_per_s: float = inf,
    window_acceptance: Mapping[int, float] | None = None,
    seed: int = 0,
) -> Rollout:
    """Run `requests` to their end with the step times of `profile`; `controller` may decide by another table.

    window_acceptance: of drafts with an attention window, acceptance over that with full attention; 1 where not given.
    """
    rng = random.Random(seed)
    slots = [_Slot(index, request, rng) for index, request in enumerate(requests)]
    away = [(slot.request.arrival_s, slot.index, slot) for slot in slots]  # a heap, by when they arrive or return
    heapq.heapify(away)
    waiting: deque[_Slot] = deque()
    running: list[_Slot] = []
    running_tokens = 0  # KV cache of the running batch
    rollout, last_gamma = Rollout(), 0
    while waiting or away or running:
        if not running and not waiting:
            rollout.time_s = max(rollout.time_s, away[0][0])
        while away and away[0][0] <= rollout.time_s:
            waiting.append(heapq.heappop(away)[2])
        while waiting and len(running) < max_running:
            slot = waiting.popleft()
            rollout.time_s += slot.prefill_tokens / prefill_tokens_per_s
            slot.context_tokens += slot.prefill_tokens
            running_tokens += slot.context_tokens
            running.append(slot)

        batch, mean_context_tokens = len(running), running_tokens / len(running)
        decision = controller.decide(State(batch=batch, mean_context_tokens=mean_context_tokens))
        gamma, rung = decision.gamma, decision.rung
        step_s = profile.costs(batch, mean_context_tokens).step_s
        rollout.time_s += step_s[rung]
        rollout.steps[gamma, decision.reason.value] += 1
        rollout.timeline.append((rollout.time_s, batch, gamma))
        if gamma != last_gamma and not decision.probe:
            rollout.switches += 1
            last_gamma = gamma

        factor = (window_acceptance or {}).get(rung.window, 1.0)
        accepted = [_accepted(slot, gamma, factor) for slot in running] if gamma else [0] * batch
        if gamma:
            controller.observe(accepted, rung)
            rollout.cycles += batch
            rollout.accepted += sum(accepted)
        if decision.probe:
            rollout.probe_excess_s += step_s[rung] - (1.0 + sum(accepted) / batch) * step_s[PLAIN]
        step_tokens, done = 0, []
        for slot, count in zip(running, accepted):
            emitted = min(count + 1, slot.left)
            slot.left -= emitted
            slot.generated += emitted
            slot.context_tokens += emitted
            step_tokens += emitted
            if not slot.left:
                done.append(slot)
        rollout.tokens += step_tokens
        running_tokens += step_tokens
        if done:
            running = [slot for slot in running if slot.left]
        for slot in done:
            running_tokens -= slot.context_tokens
            slot.turn += 1
            if slot.turn < len(slot.request.turns):
                slot.left, slot.prefill_tokens = slot.request.turns[slot.turn], slot.request.turn_prompt_tokens
                heapq.heappush(away, (rollout.time_s + slot.request.turn_wait_s, slot.index, slot))
    return rollout


def _accepted(slot: _Slot, gamma: int, factor: float) -> int:
    alphas, hardness, first = slot.request.alphas, slot.hardness, slot.generated
    deepest, total, count = len(alphas) - 1, len(hardness), 0  # drafts past the end are as hard as the first tokens
    while count < gamma and hardness[(first + count) % total] < factor * alphas[min(count, deepest)]:
        count += 1
    return count
