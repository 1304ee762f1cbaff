"""Live seconds of cycles over predicted ones, by running requests, in two rollouts before and after the host's wait for the GPU was mended:
`python live.py`, from this folder. By one table of step times, without the window of 128 that it lacks; a stalled step counts 1.5 times itself."""

import json
from pathlib import Path

from er_sglang.policy.profile import Profile, Rung

UP_TO = (8, 16, 32, 48, 64, 96, 128)

profile = Profile.read("14b-rollout-earlier/profile.json")
print(f"{'':50}", *(f"{up_to:6}" for up_to in UP_TO))
for trace in sorted(Path().glob("14b-rollout*/trace*.jsonl")):
    seconds = {up_to: [0.0, 1e-9] for up_to in UP_TO}
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    for step, following in zip(steps, steps[1:]):
        if step["gamma"] and step["window"] in profile.windows:
            predicted_s = profile.step_s(step["batch"], step["context_tokens"], Rung(step["gamma"], step["window"]))
            cell = seconds[next(up_to for up_to in UP_TO if step["batch"] <= up_to)]
            cell[0] += min(following["time_s"] - step["time_s"], 1.5 * predicted_s)
            cell[1] += predicted_s
    print(f"{trace!s:50}", *(f"{live / predicted:6.3f}" for live, predicted in seconds.values()))
