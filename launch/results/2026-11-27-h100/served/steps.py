"""Live steps against the table of step times, and what `auto` drafted: `python steps.py`, from this folder.

By model and number of requests at 1024 tokens: live seconds of cycles and of plain steps over those of the table, steps that follow
another like them, stalled ones left out; what the drafted rungs lose by the table, at stated acceptance, against the
best; the rungs most drafted; and steps that took 50 ms more than the step before, in their first run and since nothing
is compiled amid them."""

import json
import lzma
from collections import Counter, defaultdict
from statistics import mean

from er_sglang.policy.acceptance import emitted
from er_sglang.policy.profile import Profile, Rung

ALPHA, WINDOWS = 0.93, {0: 1.0, 128: 0.961, 256: 0.987, 512: 0.998, 1024: 1.0}


def read(folder: str) -> list[dict]:
    steps = [json.loads(line) for line in lzma.open(f"{folder}/trace.jsonl.xz")]
    return [step for step in steps if 1000 < step["context_tokens"] < 1300]


def stalls_ms(steps: list[dict], mode: str) -> dict[int, list[int]]:
    """By requests, within a batch that stays."""
    found = defaultdict(list)
    for before, at, step in zip(steps, steps[1:], steps[2:]):
        if {each["mode"] for each in (before, at, step)} == {mode} and before["batch"] == at["batch"] == step["batch"]:
            if before["context_tokens"] <= at["context_tokens"] <= step["context_tokens"]:
                took, took_before = step["time_s"] - at["time_s"], at["time_s"] - before["time_s"]
                if took - took_before > 0.05:
                    found[step["batch"]].append(round(1e3 * took))
    return dict(found)


for model in ("14b", "7b", "8b"):
    profile, steps = Profile.read(f"{model}/decode/profile.json"), read(f"{model}/decode")
    tokens = {window: emitted([ALPHA * share] * max(profile.gammas)) for window, share in WINDOWS.items()}
    ratios, rungs = defaultdict(list), defaultdict(Counter)
    for before, step in zip(steps, steps[1:]):
        kind, kind_before = ([each[key] for key in ("batch", "gamma", "window", "mode")] for each in (step, before))
        rung = Rung(step["gamma"], step["window"])
        if kind == kind_before:
            ratio = (step["time_s"] - before["time_s"]) / profile.step_s(step["batch"], step["context_tokens"], rung)
            if 0.5 < ratio < 1.5:
                ratios[step["batch"], bool(rung.gamma)].append(ratio)
        if step["mode"] == "auto":
            rungs[step["batch"]][rung] += 1
    for requests in (1, 8, 16, 32, 48, 64, 96, 128):
        if sum(rungs[requests].values()) < 20:
            continue
        costs, _ = profile.costs(requests, 1152)
        emits = sum(count * tokens[rung.window][rung.gamma] for rung, count in rungs[requests].items())
        speed = emits / sum(count * costs[rung] for rung, count in rungs[requests].items())
        best = max(tokens[rung.window][rung.gamma] / seconds for rung, seconds in costs.items() if rung.gamma)
        most = ", ".join(
            f"{gamma} with {window or 'all'}: {count}" for (gamma, window), count in rungs[requests].most_common(3)
        )
        print(
            f"{model} {requests:4} requests: cycles {mean(ratios[requests, True]):.3f}, plain {mean(ratios[requests, False]):.3f}; "
            f"{100 * (1 - speed / best):.1f} % less than the best ({most})"
        )
    for what in ("decode-compiling", "decode"):
        print(f"{model}, {what}, ms of stalled steps of auto by requests: {stalls_ms(read(f'{model}/{what}'), 'auto')}")
