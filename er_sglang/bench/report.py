"""Plots of benchmarks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from er_sglang.bench.load import LoadResult
from er_sglang.tools.plots import Bin, series

TIMELINE_BINS = 60


def plot_loads(path: Path, results: Mapping[str, LoadResult], bins: Mapping[str, Sequence[Bin]], title: str) -> None:
    """Tokens per second and running batch over time, one colour per arm; gamma and accept length of arms with bins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), layout="constrained")
    rate, batch, gamma, accept = figure.subplots(4, 1, sharex=True)
    for arm, result in results.items():
        bin_s = result.wall_s / TIMELINE_BINS
        edges_s = [i * bin_s for i in range(TIMELINE_BINS + 1)]
        received = [result.tokens_at(t) for t in edges_s]
        line = rate.step(
            edges_s[1:], [(b - a) / bin_s for a, b in zip(received, received[1:])], where="pre", label=arm
        )[0]
        colour = line.get_color()
        batch.step(edges_s, [result.running_at(t) for t in edges_s], where="post", color=colour)
        if arm in bins:
            times_s = [each.time_s for each in bins[arm]]
            gamma.step(times_s, series(bins[arm], "gamma"), where="mid", color=colour)
            accept.step(times_s, series(bins[arm], "accept_length"), where="mid", color=colour)
    rate.set_ylabel("tokens/s")
    batch.set_ylabel("requests decoding")
    gamma.set_ylabel("gamma")
    accept.set_ylabel("accept length")
    accept.set_xlabel("seconds")
    for axis in (rate, batch, gamma, accept):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    rate.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def plot_grid(path: Path, rows: Sequence[Mapping[str, object]], title: str) -> None:
    """Tokens per second over concurrency, and relative to the first arm, from rows of the benchmark's table."""
    from matplotlib.figure import Figure

    rates: dict[str, dict[int, float]] = {}
    for row in rows:
        arm = f"{row['arm']}, {row['options']}" if "options" in row else row["arm"]
        rates.setdefault(arm, {})[row["concurrency"]] = row["tokens/s"]
    arms = list(rates)
    figure = Figure(figsize=(9, 8), layout="constrained")
    rate, ratio = figure.subplots(2, 1, sharex=True)
    for arm in arms:
        rate.plot(rates[arm].keys(), rates[arm].values(), marker="o", label=arm)
        shared = [c for c in rates[arm] if c in rates[arms[0]]]
        ratio.plot(shared, [rates[arm][c] / rates[arms[0]][c] for c in shared], marker="o")
    rate.set(ylabel="decode tokens/s", xscale="log", yscale="log")
    ratio.set(ylabel=f"relative to {arms[0]}", xlabel="concurrent requests", ylim=(0, None))
    concurrencies = sorted({row["concurrency"] for row in rows})
    ratio.set_xticks(concurrencies, [str(c) for c in concurrencies], minor=False)
    ratio.minorticks_off()
    ratio.axhline(1.0, color="grey", linewidth=0.8)
    for axis in (rate, ratio):
        axis.grid(alpha=0.3)
    rate.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
