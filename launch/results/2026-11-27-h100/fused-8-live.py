"""Live seconds of steps over those of the table of step times, and tokens of a request a step, by requests, gamma and window:
`python fused-8-live.py`, from this folder. Of steps that follow another like them; a stalled one is left out."""

import json
import lzma
from collections import defaultdict

from er_sglang.policy.profile import Profile, Rung

for model in ("14b", "7b", "8b"):
    profile = Profile.read(f"{model}-fused-8/profile.json")
    steps = [json.loads(line) for line in lzma.open(f"{model}-fused-8/trace.jsonl.xz")]
    kinds = defaultdict(list)
    for before, step in zip(steps, steps[1:]):
        kind, kind_before = ([each[key] for key in ("batch", "gamma", "window", "mode")] for each in (step, before))
        if kind == kind_before:
            rung = Rung(step["gamma"], step["window"])
            ratio = (step["time_s"] - before["time_s"]) / profile.step_s(step["batch"], step["context_tokens"], rung)
            if 0.5 < ratio < 1.5:
                kinds[(step["batch"], *rung)].append((ratio, 1 + step["accepted"] / step["batch"]))
    for (batch, gamma, window), found in sorted(kinds.items()):
        if len(found) > 10:
            ratio, tokens = (sum(each) / len(found) for each in zip(*found))
            print(
                f"{model} {batch:4} requests, gamma {gamma}, window {window:3}: {len(found):5} steps, {ratio:.3f}, {tokens:.2f} tokens"
            )
