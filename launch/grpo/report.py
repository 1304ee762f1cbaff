"""What the runs in a folder showed: two tables, whether the learning curves differ, and a plot.

A run is one arm and seed, in a file of its own, ARM-SEED.json, written anew at every step. So runs of several calls, or
of several machines, are compared once they lie in one folder, and what was cut off can be told from what was finished.
"""

import dataclasses
import itertools
import json
import operator
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from er_sglang.tools.results import table, write_json
from launch.grpo.loop import StepRecord

Columns = dict[str, list[float | None]]
"""A run's records, one list per field, in the order of its steps."""
Runs = dict[str, dict[int, Columns]]
"""By arm and seed."""

ENDS = 5  # steps that the start and the end of training average, or a quarter of the run
PLAIN = "plain"
ON_CPU = "Seconds are those of a CPU, where drafting gains nothing, and of whatever else the machine did: no speed is measured here."


def write_run(folder: Path, arm: str, seed: int, about: Mapping, records: Sequence[StepRecord]) -> None:
    """`about`: policy, settings, place and environment."""
    path = folder / f"{arm}-{seed}.json"
    partial = path.with_suffix(".partial")
    write_json(partial, {"arm": arm, "seed": seed, **about, "records": columns(records)})
    partial.replace(path)


def read_runs(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*-[0-9]*.json"))]


def finished(run: Mapping) -> bool:
    return len(run["records"]["reward"]) == run["settings"]["steps"]


def check_alike(runs: Sequence[Mapping], about: Mapping) -> None:
    """Raise ValueError if one of the runs is of another policy or of other settings."""
    for run in runs:
        for name in ("policy", "settings", "place"):
            if run[name] != about[name]:
                raise ValueError(
                    f"{run['arm']}, seed {run['seed']}, has {name} {run[name]}, not {about[name]}: choose another --out."
                )


def columns(records: Sequence[StepRecord]) -> Columns:
    """StepRecords, turned over; floats to six significant digits."""
    names = [field.name for field in dataclasses.fields(StepRecord)]
    return {name: [_rounded(getattr(record, name)) for record in records] for name in names}


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(folder: Path) -> str:
    """Write table.md and plot.png of the finished runs in `folder`; returns the table's text."""
    read = read_runs(folder)
    runs: Runs = {}
    for run in filter(finished, read):
        runs.setdefault(run["arm"], {})[run["seed"]] = run["records"]
    unfinished = [
        f"{run['arm']}, seed {run['seed']} ({len(run['records']['reward'])})" for run in read if not finished(run)
    ]
    if not runs:
        return f"No run is finished: {'; '.join(unfinished) or folder}."
    runs = {arm: runs[arm] for arm in sorted(runs, key=lambda arm: arm != PLAIN)}
    on_gpu = read[0]["place"] == "cuda"
    parts = [
        about(read),
        _table([learning_row(arm, seeds) for arm, seeds in runs.items()]),
        _table([time_row(arm, seeds, runs.get(PLAIN, {}) if on_gpu else {}) for arm, seeds in runs.items()]),
        comparison(runs),
        *([] if on_gpu else [ON_CPU]),
        *([f"Left out, as not finished (steps): {'; '.join(unfinished)}."] if unfinished else []),
    ]
    text = "\n\n".join(parts)
    (folder / "table.md").write_text(text + "\n")
    plot(folder / "plot.png", runs)
    return text


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """Without the columns that no row fills."""
    filled = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return table([{name: row[name] for name in filled} for row in rows])


def about(read: Sequence[Mapping]) -> str:
    """What was run, and on what."""
    run = read[0]
    hardware, settings = run["environment"]["hardware"], run["settings"]
    where = hardware["gpu"] if run["place"] == "cuda" else f"{hardware['cpu_cores']} cores of {hardware['cpu']}"
    commands = "\n".join(dict.fromkeys(f"    {each['environment']['command']}" for each in read))
    return (
        f"{run['policy']}, {settings['prompts']} prompts x {settings['group']} rollouts of up to "
        f"{settings['max_new_tokens']} tokens a step, {settings['steps']} steps, on {where}:\n\n{commands}"
    )


def learning_row(arm: str, seeds: Mapping[int, Columns]) -> dict:
    """What moves: means over the seeds, at the start and at the end of training."""
    return {
        "arm": arm,
        "seeds": len(seeds),
        "reward": _moved(seeds, "reward"),
        "accepted": _moved(seeds, "accepted"),
        "accept length": _moved(seeds, "accept_length"),
        "steps that draft": _moved(seeds, "drafting"),
        "refreshes a step": _mean(seeds, "refreshes"),
        "response tokens": _moved(seeds, "response_tokens", ".0f"),
        "p90": _mean(seeds, "response_tokens_p90"),
        "longest": max(max(run["response_tokens_max"]) for run in seeds.values()),
        "ln ratio, mean": _mean(seeds, "mean_log_ratio"),
        "largest": max(max(run["max_log_ratio"]) for run in seeds.values()),
    }


def time_row(arm: str, seeds: Mapping[int, Columns], plain: Mapping[int, Columns]) -> dict:
    """Mean over the seeds +- their standard deviation; speed-ups are paired by seed, none if `plain` is empty."""
    ours = {seed: _totals(run) for seed, run in seeds.items()}
    theirs = {seed: _totals(run) for seed, run in plain.items() if seed in seeds}

    def spread(name: str, digits: str = ".2f") -> str | None:
        return _spread([totals[name] for totals in ours.values()], digits)

    def speedup(name: str) -> str | None:
        return _spread([totals[name] / ours[seed][name] for seed, totals in theirs.items()], ".3f")

    return {
        "arm": arm,
        "rollout s": spread("rollout_s"),
        "tokens/s": spread("tokens_per_s", ".0f"),
        "rollout, x plain": speedup("s_per_token"),
        "step s": spread("step_s"),
        "step, x plain": speedup("step_s"),
        **{name: _mean(seeds, name.replace(" ", "_")) for name in ("train s", "sleep s", "update s", "refresh ms")},
        "server GB": _mean(seeds, "server_gb"),
        "asleep": _mean(seeds, "sleeping_server_gb"),
        "trainer GB": _mean(seeds, "trainer_gb"),
    }


def _totals(run: Columns) -> dict[str, float]:
    """Of a run: seconds of a rollout and of a step; rollouts' speed. What was sampled differs between runs, so speeds
    are compared by the token."""
    rollout_s, steps = sum(run["rollout_s"]), len(run["rollout_s"])
    tokens = sum(map(operator.mul, run["tokens_per_s"], run["rollout_s"]))
    step_s = sum(sum(run[name]) for name in ("rollout_s", "sleep_s", "train_s", "update_s"))
    return {
        "rollout_s": rollout_s / steps,
        "tokens_per_s": tokens / rollout_s,
        "s_per_token": rollout_s / tokens,
        "step_s": step_s / steps,
    }


def _spread(values: Sequence[float], digits: str = ".2f") -> str | None:
    if not values:
        return None
    error = f" +- {statistics.stdev(values):{digits}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{digits}}{error}"


def _ends(seeds: Mapping[int, Columns]) -> tuple[slice, slice]:
    """The first and the last steps of a run, five where it has ten."""
    steps = len(next(iter(seeds.values()))["reward"])
    width = max(1, min(ENDS, steps // 2))
    return slice(width), slice(-width, None)


def _moved(seeds: Mapping[int, Columns], name: str, digits: str = ".3f") -> str | None:
    """Mean of the first and of the last steps; None where nothing is drafted at either."""
    first, last = (_mean(seeds, name, steps) for steps in _ends(seeds))
    return None if first is None or last is None else f"{first:{digits}} to {last:{digits}}"


def _mean(seeds: Mapping[int, Columns], name: str, steps: slice = slice(None)) -> float | None:
    """Over seeds and steps, without those that have no value."""
    values = [value for run in seeds.values() for value in run[name][steps] if value is not None]
    return statistics.fmean(values) if values else None


def comparison(runs: Runs) -> str:
    """Each arm's rewards against the plain arm's, paired by seed: in the last steps, and over the whole run."""
    pairs = {arm: sorted(seeds.keys() & runs.get(PLAIN, {}).keys()) for arm, seeds in runs.items() if arm != PLAIN}
    pairs = {arm: seeds for arm, seeds in pairs.items() if len(seeds) > 1}
    if not pairs:
        return "Learning curves are compared over two seeds and more, with the plain arm among the arms."
    lines = ["Reward against plain decoding, paired by seed; mean +- standard error:"]
    for what, steps in (("last steps", _ends(runs[PLAIN])[1]), ("whole run", slice(None))):
        by_seed = {
            arm: {seed: _mean({seed: run}, "reward", steps) for seed, run in seeds.items()}
            for arm, seeds in runs.items()
        }
        lines.append(f"- {what}: plain {_mean_and_error(list(by_seed[PLAIN].values()))}")
        for arm, seeds in pairs.items():
            differences = [by_seed[arm][seed] - by_seed[PLAIN][seed] for seed in seeds]
            lines.append(
                f"  - {arm}, {len(seeds)} seeds: {_mean_and_error(differences, '+')} "
                f"(sign-flip p = {sign_flip_p(differences):.2f})"
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
    """Reward, rollout seconds, acceptance and accept length over training steps: the seeds' mean, in the band of their
    least and greatest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = {
        "reward": "reward",
        "rollout_s": "rollout seconds",
        "accepted": "accepted share of drafted tokens",
        "accept_length": "tokens per request and step",
    }
    for axis, (name, label) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items()):
        for number, (arm, seeds) in enumerate(runs.items()):
            steps = [
                [value for value in step if value is not None] for step in zip(*(run[name] for run in seeds.values()))
            ]
            drawn = [(step, values) for step, values in enumerate(steps) if values]
            if drawn:
                x, values = zip(*drawn)
                axis.plot(x, list(map(statistics.fmean, values)), color=f"C{number}", linewidth=2, label=arm)
                axis.fill_between(x, list(map(min, values)), list(map(max, values)), color=f"C{number}", alpha=0.15)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    reward, rollout, *lower = figure.axes
    reward.set_ylim(0, 1)
    reward.legend()
    rollout.set_ylim(bottom=0)
    for axis in lower:
        axis.set_xlabel("training step")
    figure.savefig(path, dpi=80)
