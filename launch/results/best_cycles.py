"""The best cycle by measured step times and stated acceptance, and what a draft should take for the gain that was asked.

python best_cycles.py FOLDER:REQUESTS:CONTEXT:ASKED...      each of a folder with a profile.json
"""

import sys

from er_sglang.policy.acceptance import emitted
from er_sglang.policy.profile import PLAIN, Profile

ALPHA, WINDOWS = 0.93, {0: 1.0, 128: 0.961, 256: 0.987, 512: 0.998, 1024: 1.0}

for cell in sys.argv[1:]:
    folder, requests, context, asked = cell.split(":")
    requests, context, asked = int(requests), int(context), float(asked)
    profile = Profile.read(f"{folder}/profile.json")
    step_s, _ = profile.costs(requests, context)
    tokens = {window: emitted([ALPHA * share] * max(profile.gammas)) for window, share in WINDOWS.items()}
    speeds = {rung: tokens[rung.window][rung.gamma] / seconds for rung, seconds in step_s.items() if rung.gamma}
    best = max(speeds, key=speeds.get)
    plain_s, draft_s = step_s[PLAIN], profile.drafted_token_s(requests, context, best.window)
    rest_s = step_s[best] - best.gamma * draft_s
    should_s = (tokens[best.window][best.gamma] * plain_s / asked - rest_s) / best.gamma
    print(
        f"{folder}, {requests} requests: plain {1e3 * plain_s:.2f} ms; {best.gamma} drafts (window {best.window}) of "
        f"{1e3 * draft_s:.2f} ms, {draft_s / plain_s:.2f} plain steps; rest {1e3 * rest_s:.2f} ms, {rest_s / plain_s:.2f} "
        f"plain steps; gain {speeds[best] * plain_s:.2f}, asked {asked}: a draft of {1e3 * should_s:.2f} ms"
    )
