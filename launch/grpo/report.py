"""What the runs showed: a table, whether the learning curves differ, and a plot."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path

Columns = dict[str, list[float | None]]
"""A run's records, one list per field, in the order of its steps."""
Runs = dict[str, list[Columns]]
"""By arm, one per seed."""

ENDS = 5  # steps that "first" and "last" average
PLAIN = "plain"


def columns(records: Sequence) -> Columns:
    """StepRecords, turned over; floats to six significant digits."""
    names = [field.name for field in dataclasses.fields(records[0])]
    return {name: [_rounded(getattr(record, name)) for record in records] for name in names}


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def rows(runs: Runs) -> list[dict]:
    """One row per arm: means over seeds and steps, or over the first and last ENDS steps."""

    def mean(arm: str, name: str, steps: slice = slice(None)) -> float | None:
        values = [value for run in runs[arm] for value in run[name][steps]]
        return None if None in values else statistics.fmean(values)

    first, last = slice(None, ENDS), slice(-ENDS, None)
    return [
        {
            "arm": arm,
            "reward, first": mean(arm, "reward", first),
            "last": mean(arm, "reward", last),
            "accepted, first": mean(arm, "accepted", first),
            "last ": mean(arm, "accepted", last),
            "accept length, first": mean(arm, "accept_length", first),
            "last  ": mean(arm, "accept_length", last),
            "refreshes a step": mean(arm, "refreshes"),
            "rollout s, median": statistics.median(value for run in runs[arm] for value in run["rollout_s"]),
            "response tokens": mean(arm, "response_tokens"),
            "largest |ln ratio|": max(max(run["max_log_ratio"]) for run in runs[arm]),
        }
        for arm in runs
    ]


def comparison(runs: Runs) -> str:
    """Each arm's rewards against the plain arm's, paired by seed: in the last ENDS steps, and over the whole run."""
    lines = []
    for arm in runs:
        if arm == PLAIN or PLAIN not in runs or len(runs[arm]) < 2:
            continue
        for what, steps in ((f"last {ENDS} steps", slice(-ENDS, None)), ("whole run", slice(None))):
            ours, plain = ([statistics.fmean(run["reward"][steps]) for run in runs[name]] for name in (arm, PLAIN))
            differences = [a - b for a, b in zip(ours, plain)]
            lines.append(
                f"- {arm}, reward of the {what}: {_mean_and_error(ours)}; plain {_mean_and_error(plain)}; difference by seed "
                f"{_mean_and_error(differences, sign='+')}, sign-flip p = {sign_flip_p(differences):.2f}"
            )
    return "\n".join([f"Mean +- standard error over seeds ({len(runs[arm])}).", *lines]) if lines else "One seed, or no plain arm: nothing compared."


def _mean_and_error(values: Sequence[float], sign: str = "") -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{sign}.3f} +- {error:.3f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """Exact two-sided p-value of the hypothesis that each difference is as likely to have the other sign."""
    observed = abs(sum(differences)) - 1e-12
    flips = itertools.product((1, -1), repeat=len(differences))
    return statistics.fmean(abs(sum(sign * d for sign, d in zip(signs, differences))) >= observed for signs in flips)


def plot(path: Path, runs: Runs) -> None:
    """Reward, accepted share and accept length, refreshes, and rollout seconds over training steps; thin lines are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = {
        "reward": "reward",
        "accept_length": "accept length",
        "refreshes": "refreshes of the drafter so far",
        "rollout_s": "rollout seconds",
    }
    for axis, (name, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items()):
        for colour, (arm, seeds) in zip(("C0", "C1", "C2"), runs.items()):
            curves = [run[name] for run in seeds if None not in run[name]]
            if name == "refreshes":
                curves = [list(itertools.accumulate(curve)) for curve in curves]
            for curve in curves:
                axis.plot(range(len(curve)), curve, color=colour, linewidth=0.6, alpha=0.4)
            if curves:
                axis.plot(range(len(curves[0])), [statistics.fmean(step) for step in zip(*curves)], color=colour, linewidth=2, label=arm)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend()
    for axis in figure.axes[2:]:
        axis.set_xlabel("training step")
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=100)
