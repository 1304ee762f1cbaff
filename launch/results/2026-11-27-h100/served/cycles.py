"""The best cycle by the step times and stated acceptance, and what a draft should take for the gain that was asked:
`python cycles.py`, from this folder."""

from er_sglang.policy.acceptance import emitted
from er_sglang.policy.profile import PLAIN, Profile

ALPHA, WINDOWS = 0.93, {0: 1.0, 128: 0.961, 256: 0.987, 512: 0.998, 1024: 1.0}
ASKED = {1: 2.0, 8: 1.9, 16: 1.75, 32: 1.5, 64: 1.35, 96: 1.25}
CELLS = [(f"{model}/decode", requests, 1152, ASKED[requests]) for model in ("14b", "7b", "8b") for requests in ASKED]
CELLS += [(f"{model}/long-context", 16, 8128, asked) for model, asked in (("14b", 2.0), ("7b", 1.9), ("8b", 1.9))]

for folder, requests, context, asked in CELLS:
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
