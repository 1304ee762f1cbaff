"""What a table of step times makes of an acceptance: `python predicted.py PROFILE`. Times of plain decoding, gamma and window chosen best.
128 requests are left out: their step times at 1336 tokens do not fit into the 14B's KV cache and are extrapolated."""

import sys

from er_sglang.policy.acceptance import emitted
from er_sglang.policy.profile import PLAIN, Profile

REQUESTS, CONTEXT_TOKENS = (1, 8, 16, 32, 48, 64, 96), 1152  # the middle of 256 tokens after 1024
ACCEPTANCE = {  # of first drafts with full attention, and shares of it by window; int4 head
    "stated": (0.93, {0: 1, 128: 0.961, 256: 0.987, 512: 0.998, 1024: 1}),
    "Qwen2.5-Coder-0.5B behind documents": (0.896, {0: 1, 256: 0.959, 512: 0.971, 1024: 0.983}),
    "Qwen2.5-Coder-1.5B behind documents": (0.906, {0: 1, 256: 0.961, 1024: 0.978}),
}

profile = Profile.read(sys.argv[1])
for name, (alpha, shares) in ACCEPTANCE.items():
    gains = []
    for requests in REQUESTS:
        step_s, _ = profile.costs(requests, CONTEXT_TOKENS)
        gains.append(
            max(
                emitted([alpha * shares[rung.window]] * rung.gamma)[-1] * step_s[PLAIN] / seconds
                for rung, seconds in step_s.items()
                if rung.gamma and rung.window in shares
            )
        )
    print(f"{name:36}", *(f"{gain:5.2f}" for gain in gains))
window = 256
ratios = (profile.drafted_token_s(n, CONTEXT_TOKENS, window) / profile.target_s(n, CONTEXT_TOKENS) for n in REQUESTS)
print(f"{'a drafted token / a policy step':36}", *(f"{ratio:5.2f}" for ratio in ratios))
