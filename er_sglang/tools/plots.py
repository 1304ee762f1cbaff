"""`er-sglang plot`: where drafting pays, by a profile; what a server did, by its trace. Needs matplotlib."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from er_sglang.errors import ConfigError
from er_sglang.policy.decide import predicted_speedups
from er_sglang.policy.profile import Profile
from er_sglang.steering.trace import read_steps

POINTS = 160  # of the crossover map, along each axis
BINS = 300  # of the timeline, at most


def best_gamma(profile: Profile, batch: float, context_tokens: float, alphas: Sequence[float]) -> tuple[int, float]:
    """The draft length with the most tokens per second, and the speed-up over plain decoding of the best that drafts.

    alphas: conditional acceptance per draft position, for the profile's longest draft, with any attention window.
    """
    step_s, _ = profile.costs(batch, context_tokens)
    speedups = predicted_speedups(dict.fromkeys(profile.windows, alphas), profile.gammas, step_s)
    best = max(speedups, key=speedups.__getitem__)
    return (best.gamma if speedups[best] > 1.0 else 0), speedups[best]


@dataclass(slots=True)
class Bin:
    """A stretch of a trace: what its steps did. Means are over steps; None where there are none."""

    time_s: float
    batch: float | None
    gamma: float | None
    accept_length: float | None
    tokens_per_s: float


def read_trace(path: Path) -> list[dict]:
    """The steps of a trace. Raises ConfigError for another file, or for too few of them to plot."""
    try:
        steps = list(read_steps(path.read_text().splitlines()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not a trace, a JSON object in each line: {error}") from error
    if len(steps) < 2:
        raise ConfigError(f"{path} holds {len(steps)} steps: nothing to plot")
    return steps


def binned(steps: Sequence[dict], count: int) -> list[Bin]:
    """``count`` equal stretches of time, from the first step on."""
    start_s, end_s = steps[0]["time_s"], steps[-1]["time_s"]
    width_s = (end_s - start_s) / count
    groups: list[list[dict]] = [[] for _ in range(count)]
    for step in steps:
        groups[min(int((step["time_s"] - start_s) / width_s), count - 1)].append(step)
    tokens = [0.0] * count
    for before, step in zip(steps, steps[1:]):
        # A step's tokens took the time since the step before, after a pause a bin at most: they fall into one bin or
        # two.
        end = (step["time_s"] - start_s) / width_s
        begin = max((before["time_s"] - start_s) / width_s, end - 1.0)
        late = min(1.0, (end - int(end)) / (end - begin)) if end > begin else 1.0
        tokens[min(int(end), count - 1)] += late * (step["accepted"] + step["batch"])
        tokens[int(end) - 1] += (1.0 - late) * (step["accepted"] + step["batch"])
    bins = []
    for index, group in enumerate(groups):
        cycles = [step for step in group if step["gamma"]]
        requests = sum(step["batch"] for step in cycles)
        bins.append(
            Bin(
                time_s=(index + 0.5) * width_s,
                batch=sum(step["batch"] for step in group) / len(group) if group else None,
                gamma=sum(step["gamma"] for step in group) / len(group) if group else None,
                accept_length=1 + sum(step["accepted"] for step in cycles) / requests if cycles else None,
                tokens_per_s=tokens[index] / width_s,
            )
        )
    return bins


def series(bins: Sequence[Bin], name: str) -> list[float]:
    """A field of each bin; nan, a gap in the plot, where it is None."""
    return [float("nan") if (value := getattr(each, name)) is None else value for each in bins]


def plot_crossover(profile: Profile, alphas: Sequence[float], title: str, out: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.colors import BoundaryNorm, ListedColormap

    batches, contexts = (_log_axis(axis) for axis in (profile.batches, profile.contexts_tokens))
    cells = [[best_gamma(profile, batch, context, alphas) for context in contexts] for batch in batches]
    levels = [0, *profile.gammas]
    colours = ListedColormap(["#d9d9d9", *plt.get_cmap("viridis")([i / len(levels) for i in range(1, len(levels))])])
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    mesh = axes.pcolormesh(
        contexts,
        batches,
        [[levels.index(gamma) for gamma, _ in row] for row in cells],
        cmap=colours,
        norm=BoundaryNorm([i - 0.5 for i in range(len(levels) + 1)], len(levels)),
        shading="nearest",
    )
    speedups = [[speedup for _, speedup in row] for row in cells]
    if min(map(min, speedups)) < 1.0 < max(map(max, speedups)):
        axes.contour(contexts, batches, speedups, levels=[1.0], colors="crimson", linewidths=2)
        axes.plot([], [], color="crimson", label="no gain")
    for measured, marker in ((True, "."), (False, "x")):
        points = [
            (context, batch)
            for batch in profile.batches
            for context in profile.contexts_tokens
            if ((batch, context) not in profile.unavailable) == measured
        ]
        if points:
            axes.plot(
                *zip(*points), marker, color="black", markersize=4, label="measured" if measured else "extrapolated"
            )
    axes.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="running requests", title=title)
    axes.legend(loc="upper right", fontsize=8)
    colour_bar = figure.colorbar(mesh, ticks=range(len(levels)), label="best gamma")
    colour_bar.set_ticklabels([str(level) for level in levels])
    figure.savefig(out, dpi=150)
    plt.close(figure)


def plot_timeline(bins: Sequence[Bin], title: str, out: Path) -> None:
    import matplotlib.pyplot as plt

    rows = (
        ("batch", "running requests"),
        ("gamma", "gamma"),
        ("accept_length", "accept length"),
        ("tokens_per_s", "tokens/s"),
    )
    figure, axes = plt.subplots(len(rows), figsize=(9, 7), sharex=True, layout="constrained")
    times_s = [each.time_s for each in bins]
    for panel, (name, label) in zip(axes, rows):
        panel.step(times_s, series(bins, name), where="mid", linewidth=1.2)
        panel.set_ylabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("seconds")
    figure.savefig(out, dpi=150)
    plt.close(figure)


def _log_axis(measured: Sequence[int]) -> list[float]:
    if len(measured) == 1:
        return [float(measured[0])]
    low, high = log(measured[0]), log(measured[-1])
    return [exp(low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)]


def add_command(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plot",
        help="plot where drafting pays, or what a server did",
        description="Plot where drafting pays, by a profile, or what a server did, by its trace. Needs matplotlib.",
    )
    plots = parser.add_subparsers(required=True, metavar="PLOT")
    crossover = plots.add_parser(
        "crossover",
        help="best gamma by batch and context, and the line of no gain",
        description="Colour each (running requests, context) by the draft length with the most tokens per second at a "
        "given acceptance; the red line is where drafting neither gains nor loses.",
    )
    crossover.add_argument("profile", type=Path, help="JSON of `er-sglang calibrate`, or a CSV of the same quantities")
    crossover.add_argument(
        "--acceptance",
        type=float,
        default=0.9,
        metavar="A",
        help="probability that a drafted token is accepted (default %(default)s)",
    )
    crossover.add_argument("--out", type=Path, default=Path("crossover.png"), help="default %(default)s")
    crossover.set_defaults(run=run_crossover)
    timeline = plots.add_parser(
        "timeline",
        help="running requests, gamma, accept length and tokens/s over time",
        description='Plot the trace that a server writes with {"trace": PATH} in its config.',
    )
    timeline.add_argument("trace", type=Path)
    timeline.add_argument("--out", type=Path, default=Path("timeline.png"), help="default %(default)s")
    timeline.set_defaults(run=run_timeline)


def run_crossover(args: argparse.Namespace) -> int:
    profile = Profile.read(args.profile)
    alphas = [args.acceptance] * max(profile.gammas)
    names = [args.profile.stem, *filter(None, [profile.fingerprint.get("device")]), f"acceptance {args.acceptance}"]
    plot_crossover(profile, alphas, ", ".join(names), args.out)
    print(args.out)
    return 0


def run_timeline(args: argparse.Namespace) -> int:
    steps = read_trace(args.trace)
    plot_timeline(binned(steps, min(BINS, len(steps) // 2)), args.trace.stem, args.out)
    print(args.out)
    return 0
