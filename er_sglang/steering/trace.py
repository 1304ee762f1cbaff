"""A line of JSON per decode step, for plots and for questions that counters cannot answer."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from er_sglang.errors import ConfigError
from er_sglang.steering.metrics import Launched

logger = logging.getLogger(__name__)

FLUSH_LINES = 64  # written at once: the scheduler's thread waits for the disk


class Trace:
    """Appends to a file, or to one of its own in a folder, until that has its largest size. A line holds

    time_s: Unix time at which the step's result reached the host.
    mode, settings_version: the policy's mode; how often its settings were replaced at run time before the step.
    batch, context_tokens: running requests and their mean context.
    gamma, window, reason: drafted tokens per request, how many tokens of a context they read (0: all), and why so.
    expected_speedup: over plain decoding, as predicted; null where the mode predicts nothing.
    outside: the prediction is extrapolated from the measured table.
    accepted: drafts accepted, all requests together; the step emitted accepted + batch tokens.

    The last line of a file that is full holds ``ended``, the reason, alone.
    """

    def __init__(self, path: str, max_mb: float) -> None:
        """path: a file, or a folder, ending with a slash, for all servers that share the config.

        max_mb: size of a file in 10^6 bytes, with what it held before. Raises ConfigError if it cannot be written.
        """
        if path.endswith("/"):
            path += f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self.path = Path(path).absolute()
        self._lines: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                self._left_bytes = int(max_mb * 1e6) - file.tell()
        except OSError as error:
            raise ConfigError(f"trace: cannot write {path}: {error.strerror}.") from error
        if self._left_bytes <= 0:
            logger.warning("Steps are not traced: %s has the %g MB of trace_max_mb already.", path, max_mb)
        self._max_mb = max_mb

    def write(self, step: Launched, accepted: int) -> None:
        if self._left_bytes <= 0:
            return
        line = {
            "time_s": round(time.time(), 6),
            "mode": step.mode,
            "settings_version": step.settings_version,
            "batch": step.batch,
            "context_tokens": round(step.context_tokens, 1),
            "gamma": step.rung.gamma,
            "window": step.rung.window,
            "reason": step.reason,
            "expected_speedup": step.expected_speedup,
            "outside": step.outside,
            "accepted": accepted,
        }
        self._append(line)
        if self._left_bytes <= 0:
            logger.warning("The trace %s ends: it has the %g MB of trace_max_mb.", self.path, self._max_mb)
            self._append({"ended": f"trace_max_mb: {self._max_mb:g} MB"})
            self.flush()
        elif len(self._lines) >= FLUSH_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what was kept back; called when the server runs idle, too."""
        lines, self._lines = self._lines, []
        try:
            with self.path.open("a") as file:
                file.writelines(lines)
        except OSError as error:
            logger.warning("The trace %s ends: it cannot be written (%s).", self.path, error.strerror)
            self._left_bytes = 0

    def _append(self, line: dict) -> None:
        self._lines.append(json.dumps(line) + "\n")
        self._left_bytes -= len(self._lines[-1])


def read_steps(lines: Iterable[str]) -> Iterator[dict]:
    """The steps among a trace's lines."""
    for line in lines:
        if "ended" not in (step := json.loads(line)):
            yield step
