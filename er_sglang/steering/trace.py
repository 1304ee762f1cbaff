"""A line of JSON per decode step, for plots and for questions that counters cannot answer."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

from er_sglang.steering.metrics import Launched


class Trace:
    """Appends to a file, or to one of its own in a folder. A line holds

    time_s: Unix time at which the step's result reached the host.
    mode, settings_version: the policy's mode; how often its settings were replaced at run time before the step.
    batch, context_tokens: running requests and their mean context.
    gamma, window, reason: drafted tokens per request, how many recent tokens they attend to (0: all), and why so.
    expected_speedup: over plain decoding, as predicted; null where the mode predicts nothing.
    outside: the prediction is extrapolated from the measured table.
    accepted: drafts accepted, all requests together; the step emitted accepted + batch tokens.
    """

    def __init__(self, path: str) -> None:
        """path: a file, or a folder, ending with a slash, for all servers that share the config."""
        if path.endswith("/"):
            path += f"{socket.gethostname()}-{os.getpid()}.jsonl"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)

    def write(self, step: Launched, accepted: int) -> None:
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
        self._file.write(json.dumps(line) + "\n")
