"""Every decode step passes here twice: to be given its gamma, and to report what came of it.

step = steering.launch(committed_tokens, blocker, riding)    # Launched: gamma, and why
steering.finished(accepted)                                  # the oldest step's result is on the host
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from sglang.srt.distributed import get_tp_group

from er_sglang.config import SelfQuantConfig
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller, Reason, State
from er_sglang.policy.live import LiveFactor
from er_sglang.policy.profile import Profile
from er_sglang.steering.agreement import Agreement
from er_sglang.steering.metrics import Launched, Metrics, PrometheusExporter
from er_sglang.steering.trace import Trace


class Steering:
    """The policy, fed with host data that all ranks share, and those who watch it."""

    def __init__(
        self,
        controller: Controller,
        metrics: Metrics,
        *,
        windows: Sequence[int],
        max_draft_batch: int,
        agreement: Agreement,
        trace: Trace | None,
    ) -> None:
        """windows: attention windows that a controller made by ``change_settings`` may choose from."""
        self.controller = controller
        self._windows = windows
        self.metrics = metrics
        self._max_draft_batch = max_draft_batch
        self._agreement = agreement
        self._trace = trace
        self.busy = False  # whether a step was launched since the server last ran idle
        self._continuous = False
        self._live = LiveFactor()
        self._finished_at_s = 0.0
        self._finished_batch = 0
        # Steps whose results are not on the host yet, each with its decider, who learns from it.
        self._in_flight: deque[tuple[Launched, Controller]] = deque()
        self.settings_version = 0

    @property
    def in_flight_tokens(self) -> int:
        """The most tokens per request that the steps in flight can emit."""
        return sum(step.rung.gamma + 1 for step, _ in self._in_flight)

    def interrupted(self) -> None:
        """A prefill, or nothing at all, comes before the next decode step: its duration says nothing."""
        self._continuous = False

    def held_up(self) -> None:
        """An update or a refresh came between: the step in flight waited for it, too."""
        self.interrupted()
        self._finished_batch = 0

    def launch(self, committed_tokens: Sequence[int], blocker: str | None, riding: Mapping[int, str]) -> Launched:
        """How the next step is to be taken.

        committed_tokens: of each running request, tokens in the KV cache that the host knows of.
        blocker: why this batch must not be drafted for, None if it may.
        riding: rows that must not be drafted for and can ride along, and why.
        """
        batch = len(committed_tokens)
        if batch > self._max_draft_batch:
            blocker = blocker or "max-draft-batch"
        if len(riding) == batch:
            blocker = blocker or next(iter(riding.values()))
        state = State(
            batch=batch,
            mean_context_tokens=sum(committed_tokens) / batch,
            blocker=blocker,
            riding=len(riding),
        )
        decision = self.controller.decide(state)
        self._agreement.add((state, decision.rung))
        if self._agreement.check() and self.controller.config.live_times:
            self.controller.cycle_factor = self._agreement.of_first(self._live.value)
        profile = self.controller.profile
        step = Launched(
            rung=decision.rung,
            reason=blocker if decision.reason is Reason.BLOCKED else decision.reason.value,
            batch=batch,
            context_tokens=state.mean_context_tokens,
            expected_speedup=decision.expected_speedup,
            outside=decision.outside,
            probe=decision.probe,
            plain_s=profile.target_s(batch, state.mean_context_tokens) if profile else None,
            step_s=profile.step_s(batch, state.mean_context_tokens, decision.rung) if profile else None,
            mode=self.controller.config.mode,
            settings_version=self.settings_version,
            continuous=self._continuous,
            refused=decision.reason is Reason.BLOCKED,
            riding=riding,
        )
        self._in_flight.append((step, self.controller))
        self.busy = self._continuous = True
        self.metrics.launched(step)
        return step

    def finished(self, accepted: Sequence[int]) -> None:
        """accepted: drafts accepted of each request of the oldest step not yet reported."""
        step, decider = self._in_flight.popleft()
        took_s = self._took_s(step)
        if took_s is not None and step.step_s is not None:
            self._live.observe(step.rung.gamma > 0, step.step_s, took_s)
        self.metrics.finished(step, accepted, took_s)
        self._agreement.add(accepted)
        if step.rung.gamma:
            decider.observe([count for row, count in enumerate(accepted) if row not in step.riding], step.rung)
        if self._trace:
            self._trace.write(step, sum(accepted))

    def _took_s(self, step: Launched) -> float | None:
        """Seconds since the result before; None where the step alone did not take them: the host did something else in
        between, such as ending requests, which costs as much as a step where the policy is small."""
        now_s = time.perf_counter()
        took_s, self._finished_at_s = now_s - self._finished_at_s, now_s
        batches = {self._finished_batch, step.batch, *(later.batch for later, _ in self._in_flight)}
        self._finished_batch = step.batch
        return took_s if step.continuous and len(batches) == 1 else None

    def change_settings(self, config: PolicyConfig) -> None:
        """Decide by other settings from the next step on, as a server started with them would; counters run on."""
        cycle_factor = self.controller.cycle_factor if config.live_times else 1.0
        self.controller = Controller(config, self.controller.profile, self._windows)
        self.controller.cycle_factor = cycle_factor
        self.settings_version += 1
        self._agreement.add(config)

    def snapshot(self) -> dict:
        """Counters for /server_info. cycle_factor: by what cycles are thought slower than the profile says; trace: its
        file, which holds the counted steps by then."""
        if self._trace:
            self._trace.flush()
        return {
            **self.metrics.snapshot(),
            "cycle_factor": self.controller.cycle_factor,
            "trace": self._trace and str(self._trace.path),
        }

    def policy_updated(self) -> None:
        """The drafter follows new weights of the policy."""
        self.held_up()
        self.controller.policy_updated()

    def idle(self) -> None:
        """No request is left, running or waiting."""
        if self.busy:
            self.busy = False
            self.interrupted()
            if self._trace:
                self._trace.flush()
            self.controller.idle()


def create_steering(
    config: SelfQuantConfig, max_draft_batch: int, profile: Profile | None, server_args, dp_rank: int | None
) -> Steering:
    """Rank 0 of every replica exports and traces; the ranks of a tensor-parallel group check each other."""
    group = get_tp_group()
    exporter = trace = None
    if group.rank_in_group == 0:
        if server_args.enable_metrics:
            replica = {} if dp_rank is None else {"dp_rank": str(dp_rank)}
            more = server_args.extra_metric_labels or {}
            exporter = PrometheusExporter(
                {"model_name": server_args.served_model_name, "tp_rank": "0", **replica, **more}
            )
        if config.trace:
            trace = Trace(config.trace, config.trace_max_mb)
    return Steering(
        Controller(config.policy, profile, config.drafter.windows),
        Metrics(config.gamma_max, exporter),
        windows=config.drafter.windows,
        max_draft_batch=max_draft_batch,
        agreement=Agreement(group.cpu_group if group.world_size > 1 and config.policy.gammas else None),
        trace=trace,
    )
