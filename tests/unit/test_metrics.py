"""Counters of steps that overlap, predicted and measured speed-up, and the trace's lines."""

import json
import os
from dataclasses import replace

import pytest

from er_sglang.errors import ConfigError
from er_sglang.policy.profile import Rung
from er_sglang.steering.metrics import Launched, Metrics
from er_sglang.steering.trace import FLUSH_LINES, Trace, read_steps


def step(gamma: int, batch: int = 2, **kwargs) -> Launched:
    return Launched(rung=Rung(gamma), reason="pays" if gamma else "slower", batch=batch, context_tokens=100.0, **kwargs)


def test_overlapped_steps_are_counted_in_order():
    metrics = Metrics(gamma_max=3)
    cycle, decode = step(3), step(0, batch=1)
    metrics.launched(cycle)
    metrics.launched(decode)
    metrics.finished(cycle, [3, 1], 0.01)
    metrics.finished(decode, [0], 0.01)
    snapshot = metrics.snapshot()
    assert (snapshot["cycles"], snapshot["decode_steps"], snapshot["emitted_tokens"]) == (1, 1, 7)
    assert (snapshot["drafted_tokens"], snapshot["accepted_tokens"], snapshot["accept_length"]) == (6, 4, 3.0)
    assert snapshot["acceptance_per_position"] == [1.0, 0.5, 1.0]
    assert snapshot["decisions"] == {"gamma=3:pays": 1, "gamma=0:slower": 1}


def test_a_change_of_window_is_a_switch():
    metrics = Metrics(gamma_max=3)
    for rung in (Rung(3), Rung(3, window=256), Rung(3, window=256), Rung(2)):
        cycle = replace(step(rung.gamma), rung=rung)
        metrics.launched(cycle)
        metrics.finished(cycle, [1, 1], 0.01)
    assert metrics.switches == 3
    assert metrics.snapshot()["cycles_by_window"] == {"0": 2, "256": 2} and metrics.snapshot()["window"] == 0


def test_results_out_of_order_are_an_error():
    metrics = Metrics(gamma_max=3)
    with pytest.raises(RuntimeError, match="out of order"):
        metrics.finished(step(3), [1], 0.01)


def test_probes_are_no_switches():
    metrics = Metrics(gamma_max=3)
    for gamma, probe in ((0, False), (1, True), (0, False), (3, False), (3, False), (0, False)):
        metrics.launched(step(gamma, probe=probe))
    assert (metrics.probes, metrics.switches) == (1, 2)


def test_measured_speedup():
    """Two cycles of 20 ms emit 3 tokens per request each, where plain decoding takes 10 ms a token: 1.5."""
    metrics = Metrics(gamma_max=3)
    for took_s in (None, 0.020, 0.020):
        metrics.finished(step(3, plain_s=0.010, expected_speedup=1.4), [2, 2], took_s)
    assert metrics.measured_speedup.value == pytest.approx(1.5)
    assert metrics.predicted_speedup.value == pytest.approx(1.4)
    metrics.finished(step(0, plain_s=0.010), [0, 0], None)
    assert metrics.plain_step_ratio.value is None
    metrics.finished(step(0, plain_s=0.010), [0, 0], 0.011)
    assert metrics.plain_step_ratio.value == pytest.approx(1.1)


def test_without_a_profile_nothing_is_compared():
    metrics = Metrics(gamma_max=3)
    for _ in range(2):
        metrics.finished(step(3), [2, 2], 0.01)
    assert metrics.snapshot()["measured_speedup"] is None


def trace(path, step, accepted):
    """One step of a server, which then runs idle and stops."""
    server = Trace(str(path), max_mb=1.0)
    server.write(step, accepted)
    server.flush()


def test_trace_lines(tmp_path):
    path = tmp_path / "deep" / "trace.jsonl"
    trace(path, step(3, expected_speedup=1.25, mode="auto", settings_version=2), 4)
    trace(path, step(0), 0)
    first, second = map(json.loads, path.read_text().splitlines())
    assert first.pop("time_s") > 0
    assert first == {
        "mode": "auto", "settings_version": 2,
        "batch": 2, "context_tokens": 100.0, "gamma": 3, "window": 0, "reason": "pays", "expected_speedup": 1.25, "outside": False, "accepted": 4,
    }  # fmt: skip
    assert second["expected_speedup"] is None


def test_a_trace_folder_holds_a_file_of_each_server(tmp_path):
    trace(f"{tmp_path}/traces/", step(0), 0)
    (file,) = (tmp_path / "traces").iterdir()
    assert str(os.getpid()) in file.name and len(file.read_text().splitlines()) == 1


def test_a_trace_waits_for_several_steps_or_for_idleness(tmp_path):
    path = tmp_path / "trace.jsonl"
    server = Trace(str(path), max_mb=1.0)
    for _ in range(FLUSH_LINES - 1):
        server.write(step(0), 0)
    assert path.read_text() == ""
    server.write(step(0), 0)
    assert len(path.read_text().splitlines()) == FLUSH_LINES


def test_a_trace_ends_at_its_largest_size(tmp_path, caplog):
    """Of all servers that wrote to it, the present one and those before."""
    path = tmp_path / "trace.jsonl"
    for _ in range(2):
        server = Trace(str(path), max_mb=10e-3)
        for _ in range(30):
            server.write(step(3), 4)
        server.flush()
    for _ in range(100):
        server.write(step(3), 4)
    lines = path.read_text().splitlines()
    assert json.loads(lines[-1]) == {"ended": "trace_max_mb: 0.01 MB"}
    assert 10_000 <= path.stat().st_size < 10_000 + len(lines[0]) + len(lines[-1]) + 2
    assert [each["gamma"] for each in read_steps(lines)] == [3] * (len(lines) - 1)
    Trace(str(path), max_mb=10e-3).write(step(3), 4)
    assert path.read_text().splitlines() == lines
    ended, full = (record.message for record in caplog.records)
    assert "ends: it has the 0.01 MB of trace_max_mb" in ended and "has the 0.01 MB of trace_max_mb already" in full


def test_a_trace_that_cannot_be_written(tmp_path, caplog):
    """At the start the server stops; later the trace does."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="trace: cannot write .*file/trace.jsonl: File exists"):
        Trace(f"{tmp_path}/file/trace.jsonl", max_mb=1.0)
    server = Trace(f"{tmp_path}/folder/trace.jsonl", max_mb=1.0)
    (tmp_path / "folder/trace.jsonl").unlink()
    (tmp_path / "folder").rmdir()
    server.write(step(3), 4)
    server.flush()
    assert "ends: it cannot be written (No such file or directory)" in caplog.text
