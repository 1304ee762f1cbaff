"""True counters of what was drafted, accepted and decided: /server_info, and Prometheus where it is on."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence


class Metrics:
    """Counts since the start; a step is recorded when its result reaches the host, one step late under overlap."""

    def __init__(self, gamma_max: int, exporter: PrometheusExporter | None = None) -> None:
        self.gamma = 0
        self.reason = ""
        self.running_batch = 0
        self.decisions: Counter[str] = Counter()
        self.decode_steps = 0
        self.cycles = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.emitted_tokens = 0
        self.cycle_requests = 0
        self._tried_at = [0] * gamma_max
        self._accepted_at = [0] * gamma_max
        self._in_flight: deque[tuple[int, int]] = deque()
        self._exporter = exporter

    @property
    def in_flight_tokens(self) -> int:
        """The most tokens per request that steps not yet recorded can emit."""
        return sum(gamma + 1 for gamma, _ in self._in_flight)

    def launched(self, gamma: int, reason: str, batch_size: int) -> None:
        """A decode step was launched."""
        self.gamma, self.reason, self.running_batch = gamma, reason, batch_size
        self.decisions[f"gamma={gamma}:{reason}"] += 1
        self._in_flight.append((gamma, batch_size))
        if self._exporter:
            self._exporter.decided(gamma, reason)

    def finished(self, accepted: Sequence[int]) -> int:
        """The result of the oldest unrecorded step is here: accepted drafts per request. Returns its gamma."""
        gamma, batch_size = self._in_flight.popleft()
        if len(accepted) != batch_size:
            raise RuntimeError(f"a step of {batch_size} requests came back with {len(accepted)}: results out of order")
        self.emitted_tokens += sum(accepted) + batch_size
        if gamma == 0:
            self.decode_steps += 1
            return gamma
        self.cycles += 1
        self.cycle_requests += batch_size
        self.drafted_tokens += gamma * batch_size
        self.accepted_tokens += sum(accepted)
        for count in accepted:
            for position in range(count):
                self._tried_at[position] += 1
                self._accepted_at[position] += 1
            if count < gamma:
                self._tried_at[count] += 1
        if self._exporter:
            self._exporter.finished(gamma * batch_size, sum(accepted))
        return gamma

    def snapshot(self) -> dict:
        """Plain values for /server_info.

        accept_length: mean emitted tokens per request and cycle. acceptance_per_position: conditional acceptance
        of the i-th drafted token, None where none was tried.
        """
        return {
            "gamma": self.gamma,
            "reason": self.reason,
            "running_batch": self.running_batch,
            "decode_steps": self.decode_steps,
            "cycles": self.cycles,
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "emitted_tokens": self.emitted_tokens,
            "accept_length": 1 + self.accepted_tokens / self.cycle_requests if self.cycle_requests else None,
            "acceptance_per_position": [
                accepted / tried if tried else None for accepted, tried in zip(self._accepted_at, self._tried_at)
            ],
            "decisions": dict(self.decisions),
        }


class PrometheusExporter:
    """The same counters as Prometheus metrics, in the scheduler's process."""

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Counter as PrometheusCounter
        from prometheus_client import Gauge

        def labelled(metric):
            return metric.labels(**labels)

        names = list(labels)
        self._labels = labels
        self._gamma = labelled(
            Gauge("sglang:self_quant_gamma", "Drafted tokens per request of the latest step.", names, multiprocess_mode="mostrecent")
        )
        self._drafted = labelled(PrometheusCounter("sglang:self_quant_drafted_tokens", "Drafted tokens.", names))
        self._accepted = labelled(PrometheusCounter("sglang:self_quant_accepted_tokens", "Accepted drafted tokens.", names))
        self._decisions = PrometheusCounter(
            "sglang:self_quant_decisions", "Decode steps by gamma and reason.", [*names, "gamma", "reason"]
        )

    def decided(self, gamma: int, reason: str) -> None:
        self._gamma.set(gamma)
        self._decisions.labels(**self._labels, gamma=gamma, reason=reason).inc()

    def finished(self, drafted: int, accepted: int) -> None:
        self._drafted.inc(drafted)
        self._accepted.inc(accepted)
