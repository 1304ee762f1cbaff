"""The best cycle by the step times and stated acceptance, and what a draft should take for the gain that was asked:
`python fused-8-cycles.py`, from this folder."""

from er_sglang.policy.acceptance import emitted
from er_sglang.policy.profile import PLAIN, Profile

ALPHA, WINDOWS = 0.93, {0: 1.0, 128: 0.961, 256: 0.987, 512: 0.998, 1024: 1.0}
CELLS = [(f"{model}-fused-8", requests, 1152) for model in ("14b", "7b", "8b") for requests in (8, 16)]
CELLS += [(f"{model}-fused-8-long-context", 16, 8128) for model in ("7b", "8b")]
ASKED = {("7b", 8128): 1.9, ("8b", 8128): 1.9}
ASKED |= {(model, requests): asked for model in ("14b", "7b", "8b") for requests, asked in ((8, 1.9), (16, 1.75))}

for folder, requests, context in CELLS:
    profile, model = Profile.read(f"{folder}/profile.json"), folder.split("-")[0]
    step_s, _ = profile.costs(requests, context)
    tokens = {window: emitted([ALPHA * share] * max(profile.gammas)) for window, share in WINDOWS.items()}
    speeds = {rung: tokens[rung.window][rung.gamma] / seconds for rung, seconds in step_s.items() if rung.gamma}
    best = max(speeds, key=speeds.get)
    plain_s, draft_s = step_s[PLAIN], profile.drafted_token_s(requests, context, best.window)
    rest_s = step_s[best] - best.gamma * draft_s
    asked = ASKED[model, context if context > 8000 else requests]
    should_s = (tokens[best.window][best.gamma] * plain_s / asked - rest_s) / best.gamma
    print(
        f"{folder}, {requests} requests: plain {1e3 * plain_s:.2f} ms; {best.gamma} drafts (window {best.window}) of "
        f"{1e3 * draft_s:.2f} ms; rest {1e3 * rest_s:.2f} ms, {rest_s / plain_s:.2f} plain steps; gain {speeds[best] * plain_s:.2f}, "
        f"asked {asked}: a draft of {1e3 * should_s:.2f} ms"
    )
