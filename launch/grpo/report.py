"""What the runs showed: a table, whether the learning curves differ, and a plot."""

import dataclasses
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from er_sglang.tools.results import table, write_json
from launch.grpo.rollouts import GAMMA

Columns = dict[str, list[float | None]]
"""A run's records, one list per field, in the order of its steps."""
Runs = dict[str, list[Columns]]
"""By arm, one per seed."""

ENDS = 5  # steps that the start and the end of training average
PLAIN = "plain"
ABOUT_TIMES = "Rollout seconds are those of a CPU, of this policy of two layers, and of whatever else the machine did: no speed is measured here."
COLOURS = ("C0", "C1", "C2")


def columns(records: Sequence) -> Columns:
    """StepRecords, turned over; floats to six significant digits."""
    names = [field.name for field in dataclasses.fields(records[0])]
    return {name: [_rounded(getattr(record, name)) for record in records] for name in names}


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(out: Path, runs: Runs, about: Mapping) -> str:
    """Write results.json (with `about`: the environment, the settings), table.md and plot.png; returns the table's
    text."""
    write_json(out / "results.json", {**about, "runs": runs})
    text = f"{table(rows(runs))}\n\n{comparison(runs)}\n\n{ABOUT_TIMES}\n"
    hardware = about["environment"]["hardware"]
    title = f"`{about['environment']['command']}`, on {hardware['cpu_cores']} cores of {hardware['cpu']}, gamma {GAMMA}"
    (out / "table.md").write_text(f"{title}\n\n{text}")
    plot(out / "plot.png", runs)
    return text


def rows(runs: Runs) -> list[dict]:
    """One row per arm: means over its seeds, at the start and at the end of training where something moves."""
    return [
        {
            "arm": arm,
            "reward": _moved(seeds, "reward"),
            "accepted": _moved(seeds, "accepted"),
            "accept length": _moved(seeds, "accept_length"),
            "refreshes a step": _mean(seeds, "refreshes"),
            "rollout s, median": statistics.median(value for run in seeds for value in run["rollout_s"]),
            "response tokens": _moved(seeds, "response_tokens", ".0f"),
            "largest |ln ratio|": max(max(run["max_log_ratio"]) for run in seeds),
        }
        for arm, seeds in runs.items()
    ]


def _moved(seeds: Sequence[Columns], name: str, digits: str = ".3f") -> str | None:
    """Mean of the first and of the last ENDS steps; None where nothing is drafted."""
    if seeds[0][name][0] is None:
        return None
    return f"{_mean(seeds, name, slice(ENDS)):{digits}} to {_mean(seeds, name, slice(-ENDS, None)):{digits}}"


def _mean(seeds: Sequence[Columns], name: str, steps: slice = slice(None)) -> float:
    return statistics.fmean(value for run in seeds for value in run[name][steps])


def comparison(runs: Runs) -> str:
    """Each arm's rewards against the plain arm's, paired by seed: in the last ENDS steps, and over the whole run."""
    if PLAIN not in runs or len(runs[PLAIN]) < 2:
        return "Learning curves are compared over two seeds and more, with the plain arm among the arms."
    lines = [f"Reward against plain decoding, paired by seed ({len(runs[PLAIN])}); mean +- standard error:"]
    for what, steps in ((f"last {ENDS} steps", slice(-ENDS, None)), ("whole run", slice(None))):
        by_seed = {arm: [_mean([run], "reward", steps) for run in seeds] for arm, seeds in runs.items()}
        lines.append(f"- {what}: plain {_mean_and_error(by_seed[PLAIN])}")
        for arm in runs:
            if arm != PLAIN:
                differences = [ours - plain for ours, plain in zip(by_seed[arm], by_seed[PLAIN])]
                lines.append(
                    f"  - {arm}: {_mean_and_error(differences, '+')} (sign-flip p = {sign_flip_p(differences):.2f})"
                )
    return "\n".join(lines)


def _mean_and_error(values: Sequence[float], sign: str = "") -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):{sign}.3f} +- {error:.3f}"


def sign_flip_p(differences: Sequence[float]) -> float:
    """How often a mean difference at least this large comes up if each seed's is as likely to have the other sign."""
    observed = abs(sum(differences)) - 1e-12  # the same sum in another order may round down
    flips = itertools.product((1, -1), repeat=len(differences))
    return statistics.fmean(abs(sum(sign * d for sign, d in zip(signs, differences))) >= observed for signs in flips)


def plot(path: Path, runs: Runs) -> None:
    """Reward, accept length, refreshes and rollout seconds over training steps; thin lines are seeds, thick ones their
    mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = {
        "reward": "reward",
        "accept_length": "accept length",
        "refreshes": "refreshes of the drafter so far",
        "rollout_s": "rollout seconds",
    }
    for axis, (name, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items()):
        for colour, (arm, seeds) in zip(COLOURS, runs.items()):
            if seeds[0][name][0] is None:
                continue
            curves = [list(itertools.accumulate(run[name])) if name == "refreshes" else run[name] for run in seeds]
            for curve in curves:
                axis.plot(curve, color=colour, linewidth=0.6, alpha=0.4)
            axis.plot([statistics.fmean(step) for step in zip(*curves)], color=colour, linewidth=2, label=arm)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    reward, accept_length, refreshes, rollout = figure.axes
    reward.set_ylim(0, 1)
    reward.legend()
    accept_length.secondary_yaxis(
        "right", functions=(lambda length: (length - 1) / GAMMA, lambda share: 1 + GAMMA * share)
    ).set_ylabel("accepted share")
    for axis in (refreshes, rollout):
        axis.set_xlabel("training step")
        axis.set_ylim(bottom=0)
    figure.savefig(path, dpi=80)
