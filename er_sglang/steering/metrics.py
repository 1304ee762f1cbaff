"""True counters of what was drafted, accepted and decided: /server_info, and Prometheus where it is on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from er_sglang.policy.profile import PLAIN, Rung

logger = logging.getLogger(__name__)

RECENT_STEPS = 100  # what "recent" speed-ups are averaged over, exponentially weighted


@dataclass(frozen=True, kw_only=True, slots=True)
class Launched:
    """A decode step on its way.

    rung: gamma and attention window. reason: why these. outside: decided by extrapolated step times.
    plain_s, step_s: the profile's seconds of a plain decode step of this batch, and of this step; None without one.
    probe: drafts to learn, not to gain.
    mode, settings_version: the policy's mode, and how often its settings were replaced at run time before it.
    continuous: it follows another decode step at once.
    refused: the whole batch is not drafted for, for this reason.
    riding: rows that are not drafted for in a cycle of the others, and why.
    """

    rung: Rung
    reason: str
    batch: int
    context_tokens: float
    expected_speedup: float | None = None
    outside: bool = False
    probe: bool = False
    plain_s: float | None = None
    step_s: float | None = None
    mode: str = ""
    settings_version: int = 0
    continuous: bool = False
    refused: bool = False
    riding: Mapping[int, str] = field(default_factory=dict)


def named(by_window: Mapping[int, object]) -> dict[str, object]:
    """For JSON, whose keys are strings."""
    return {str(window): value for window, value in by_window.items()}


class RecentRatio:
    """Ratio of two sums that forget: None until something was added."""

    def __init__(self) -> None:
        self._sums = [0.0, 0.0]

    def add(self, numerator: float, denominator: float) -> None:
        keep = 1.0 - 1.0 / RECENT_STEPS
        self._sums = [keep * total + value for total, value in zip(self._sums, (numerator, denominator))]

    @property
    def value(self) -> float | None:
        numerator, denominator = self._sums
        return numerator / denominator if denominator else None


class Metrics:
    """Counts since the start; a step is recorded when its result reaches the host, one step late under overlap."""

    def __init__(self, gamma_max: int, exporter: PrometheusExporter | None = None) -> None:
        self.latest = Launched(rung=PLAIN, reason="", batch=0, context_tokens=0.0)
        self.decisions: Counter[str] = Counter()
        self.outside = 0
        self.probes = 0
        self.switches = 0
        self.decode_steps = 0
        self.cycles = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.emitted_tokens = 0
        self.cycle_requests = 0
        self.riding_tokens: Counter[str] = Counter()
        self.refused_tokens: Counter[str] = Counter()
        self.predicted_speedup = RecentRatio()
        self.measured_speedup = RecentRatio()
        self.plain_step_ratio = RecentRatio()
        self.cycles_by_window: Counter[int] = Counter()
        self._rung = PLAIN  # of the latest step that was no probe
        self._tried_at = [0] * gamma_max
        self._accepted_at = [0] * gamma_max
        self._exporter = exporter

    def launched(self, step: Launched) -> None:
        self.latest = step
        self.decisions[f"gamma={step.rung.gamma}:{step.reason}"] += 1
        self.outside += step.outside
        self.probes += step.probe
        switched = not step.probe and step.rung != self._rung
        if switched:
            self.switches += 1
            self._rung = step.rung
        if self._exporter:
            self._exporter.launched(step, switched)

    def finished(self, step: Launched, accepted: Sequence[int], took_s: float | None) -> None:
        """The result of a launched step is here: accepted drafts per request; took_s: its duration, if that is known."""
        gamma, batch = step.rung.gamma, step.batch
        if len(accepted) != batch:
            raise RuntimeError(f"a step of {batch} requests came back with {len(accepted)}: results out of order")
        self.emitted_tokens += sum(accepted) + batch
        if took_s is not None and step.plain_s is not None:
            self._compare(step, took_s, emitted=1 + sum(accepted) / batch)
        if gamma == 0:
            self.decode_steps += 1
            if step.refused:
                if step.reason not in self.refused_tokens:
                    logger.info("Not every batch can be drafted for: %s.", step.reason)
                self.refused_tokens[step.reason] += batch
                if self._exporter:
                    self._exporter.undrafted({step.reason: batch})
            return
        riding = Counter(step.riding.values())
        self.riding_tokens += riding
        drafted_for = [count for row, count in enumerate(accepted) if row not in step.riding]
        self.cycles += 1
        self.cycles_by_window[step.rung.window] += 1
        self.cycle_requests += len(drafted_for)
        self.drafted_tokens += gamma * len(drafted_for)
        self.accepted_tokens += sum(drafted_for)
        for count in drafted_for:
            for position in range(count):
                self._tried_at[position] += 1
                self._accepted_at[position] += 1
            if count < gamma:
                self._tried_at[count] += 1
        if self._exporter:
            self._exporter.undrafted(riding)
            self._exporter.finished(
                gamma * len(drafted_for), sum(drafted_for), self.predicted_speedup.value, self.measured_speedup.value
            )

    def snapshot(self) -> dict:
        """Plain values for /server_info.

        window: tokens of a context that the latest step's drafts read, 0 for all; cycles_by_window: its cycles so far.
        accept_length: mean emitted tokens per request and cycle. acceptance_per_position: conditional acceptance
        of the i-th drafted token, None where none was tried. predicted_speedup, measured_speedup: of recent cycles over
        plain decoding, which takes as long as the profile says. plain_step_ratio: seconds of recent plain decode steps
        over what the profile says. outside: decisions from extrapolated cells of the profile. riding_tokens: by reason,
        tokens of requests that took a plain step in a cycle of others, one a request and step; they are not counted as
        drafted. refused_tokens: by reason, tokens of batches that must not be drafted for. A request that ends, or is retracted,
        with a step in flight is counted in that step, too, though nobody gets its tokens.
        """
        return {
            "gamma": self.latest.rung.gamma,
            "window": self.latest.rung.window,
            "reason": self.latest.reason,
            "running_batch": self.latest.batch,
            "decode_steps": self.decode_steps,
            "cycles": self.cycles,
            "cycles_by_window": named(self.cycles_by_window),
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "emitted_tokens": self.emitted_tokens,
            "accept_length": 1 + self.accepted_tokens / self.cycle_requests if self.cycle_requests else None,
            "acceptance_per_position": [
                accepted / tried if tried else None for accepted, tried in zip(self._accepted_at, self._tried_at)
            ],
            "decisions": dict(self.decisions),
            "riding_tokens": dict(self.riding_tokens),
            "refused_tokens": dict(self.refused_tokens),
            "switches": self.switches,
            "probes": self.probes,
            "outside": self.outside,
            "predicted_speedup": self.predicted_speedup.value,
            "measured_speedup": self.measured_speedup.value,
            "plain_step_ratio": self.plain_step_ratio.value,
        }

    def _compare(self, step: Launched, took_s: float, emitted: float) -> None:
        if step.rung.gamma == 0:
            self.plain_step_ratio.add(took_s, step.plain_s)
            return
        self.measured_speedup.add(emitted * step.plain_s, took_s)
        if step.expected_speedup is not None:
            self.predicted_speedup.add(step.expected_speedup * took_s, took_s)


class PrometheusExporter:
    """The same counters as Prometheus metrics, in the scheduler's process."""

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        names = list(labels)
        self._labels = labels

        def gauge(name: str, text: str):
            return Gauge(f"sglang:self_quant_{name}", text, names, multiprocess_mode="mostrecent").labels(**labels)

        def counter(name: str, text: str):
            return PrometheusCounter(f"sglang:self_quant_{name}", text, names).labels(**labels)

        self._gamma = gauge("gamma", "Drafted tokens per request of the latest step.")
        self._window = gauge("window", "Tokens of a context that a draft of the latest step reads, 0 for all.")
        self._batch = gauge("running_batch", "Requests of the latest decode step.")
        self._predicted = gauge("predicted_speedup", "Recent cycles over plain decoding, as predicted.")
        self._measured = gauge("measured_speedup", "Recent cycles over plain decoding, as measured.")
        self._drafted = counter("drafted_tokens", "Drafted tokens.")
        self._accepted = counter("accepted_tokens", "Accepted drafted tokens.")
        self._probes = counter("probes", "Cycles that drafted to learn the acceptance.")
        self._switches = counter("switches", "Changes of gamma or window, probes aside.")
        self._decisions = PrometheusCounter(
            "sglang:self_quant_decisions", "Decode steps by gamma and reason.", [*names, "gamma", "reason"]
        )
        self._undrafted = PrometheusCounter(
            "sglang:self_quant_undrafted_tokens",
            "Tokens of requests that could not be drafted for, riding along or in refused batches, by reason.",
            [*names, "reason"],
        )

    def launched(self, step: Launched, switched: bool) -> None:
        self._gamma.set(step.rung.gamma)
        self._window.set(step.rung.window)
        self._batch.set(step.batch)
        self._probes.inc(step.probe)
        self._switches.inc(switched)
        self._decisions.labels(**self._labels, gamma=step.rung.gamma, reason=step.reason).inc()

    def undrafted(self, tokens: Mapping[str, int]) -> None:
        for reason, count in tokens.items():
            self._undrafted.labels(**self._labels, reason=reason).inc(count)

    def finished(self, drafted: int, accepted: int, predicted: float | None, measured: float | None) -> None:
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
        if predicted is not None:
            self._predicted.set(predicted)
        if measured is not None:
            self._measured.set(measured)
