"""Decoding speed by running requests: the trace of a drafting arm beside the plain server's log.

    python by_requests.py FOLDER auto > FOLDER/by_requests.md

Of the arm, drafting steps between which the batch stays; the log's figures are means of 40 steps in which requests end.
More than 96 requests are left out: the log's first figure of a rollout counts the time since the one before.
"""

import json
import lzma
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

from er_sglang.tools.results import table

BINS = [(1, 1), (2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 96)]
LONGEST_STEP_S = 0.1  # longer is no step, but a pause

here, arm = Path(sys.argv[1]), sys.argv[2]
lines = (here / "plain-throughput.txt").read_text().splitlines()[1:]
plain = [(int(requests), float(rate)) for requests, rate in map(str.split, lines)]
with lzma.open(here / f"trace-{arm}.jsonl.xz") as trace:
    steps = list(map(json.loads, trace))
rows = []
for low, high in BINS:
    cycles = [
        (step, seconds)
        for step, after in pairwise(steps)
        if low <= step["batch"] == after["batch"] <= high
        and step["gamma"]
        and (seconds := after["time_s"] - step["time_s"]) < LONGEST_STEP_S
    ]
    tokens = [step["accepted"] / step["batch"] + 1 for step, _ in cycles]
    ours, theirs = sum(tokens) / sum(s for _, s in cycles), median(r / n for n, r in plain if low <= n <= high)
    rows.append(
        {
            "running requests": f"{low} to {high}" if high > low else str(low),
            "plain, tokens/s a request": round(theirs),
            arm: round(ours),
            "gain": ours / theirs,
            "by its own estimate": fmean(step["expected_speedup"] for step, _ in cycles if step["expected_speedup"]),
            "cycles": len(cycles),
            "gamma": fmean(step["gamma"] for step, _ in cycles),
            "tokens a cycle": fmean(tokens),
            "cycle ms": 1e3 * median(s for _, s in cycles),
        }
    )
print(table(rows))
