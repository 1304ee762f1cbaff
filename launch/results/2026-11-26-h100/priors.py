"""What acceptance auto should assume before it has seen any: simulated rollouts by the step times of 14b-auto, against
a policy that knows acceptance.

    python launch/results/2026-11-26-h100/priors.py
"""

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean

from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile
from er_sglang.tools.results import table
from er_sglang.tools.simulator import simulate
from er_sglang.tools.workload import draw_lengths, make_requests

PROFILE = Profile.load(Path(__file__).with_name("14b-auto") / "profile.json")
ROLLOUTS, SEEDS = 2, range(0, 800, 100)
# Acceptance with a window over that with full attention, of Qwen2.5-Coder-0.5B: behind documents, and in its own text.
DOCUMENT, OWN_TEXT, NO_LOSS = {256: 0.82, 512: 0.87, 1024: 0.895}, {256: 0.914, 512: 0.99}, {}
LOADS = {  # requests, lengths, prompt tokens, acceptance by position, and of windows
    "64 documents": (64, "lognormal:400:0.8:2000", 1500, [0.906, 0.9], DOCUMENT),
    "8 documents": (8, "lognormal:400:0.8:2000", 4000, [0.906, 0.9], DOCUMENT),
    "64": (64, "lognormal:400:0.8:2000", 128, [0.906, 0.9], OWN_TEXT),
    "8": (8, "lognormal:400:0.8:2000", 512, [0.906, 0.9], OWN_TEXT),
    "4 at 8000": (4, "lognormal:400:0.8:2000", 8000, [0.906, 0.9], OWN_TEXT),
    "128 short": (128, "lognormal:200:0.8:1000", 128, [0.906, 0.9], OWN_TEXT),
    "128 at .85": (128, "lognormal:400:0.8:2000", 1000, [0.85], OWN_TEXT),
    "16 at .95": (16, "lognormal:400:0.8:2000", 512, [0.95], NO_LOSS),
    "32 at .7": (32, "lognormal:400:0.8:2000", 512, [0.7, 0.68, 0.65], DOCUMENT),
    "128 at .6": (128, "lognormal:400:0.8:2000", 512, [0.6], DOCUMENT),
    "8 at .6": (8, "lognormal:400:0.8:2000", 512, [0.6], DOCUMENT),
    "32 at .5": (32, "lognormal:400:0.8:2000", 512, [0.5], DOCUMENT),
}
PRIORS = {
    ".8 for all": PolicyConfig(prior_alpha=0.8, prior_window=1.0),
    ".9 for all": PolicyConfig(prior_alpha=0.9, prior_window=1.0),
    ".9, windows .81": PolicyConfig(prior_alpha=0.9, prior_window=0.9),
    "known": None,
}


class Known:
    """Acceptance that need not be learned."""

    def __init__(self, alphas: list[float]) -> None:
        self._alphas = tuple(alphas)

    def alphas(self) -> tuple[float, ...]:
        return self._alphas

    def bounds(self, _: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self._alphas, self._alphas

    def observe(self, *_) -> None: ...

    def age(self) -> None: ...

    def reset(self, _: float) -> None: ...


def gain(load: str, prior: str, seed: int) -> float:
    """Over plain decoding, of ROLLOUTS in a row."""
    batch, lengths, prompt_tokens, alphas, windows = LOADS[load]
    auto = Controller(PRIORS[prior] or PolicyConfig(), PROFILE, PROFILE.windows)
    if PRIORS[prior] is None:
        at = [alphas[min(i, len(alphas) - 1)] for i in range(max(auto.config.ladder))]
        auto.acceptance = {window: Known([windows.get(window, 1.0) * a for a in at]) for window in auto.windows}
    plain = Controller(PolicyConfig(mode="off"), PROFILE, PROFILE.windows)
    times_s = [0.0, 0.0]
    for index in range(seed, seed + ROLLOUTS):
        requests = make_requests(draw_lengths(lengths, batch, seed=index), alphas, prompt_tokens=prompt_tokens)
        for which, controller in enumerate((plain, auto)):
            rollout = simulate(PROFILE, requests, controller, window_acceptance=windows, seed=index)
            times_s[which] += rollout.time_s
    return times_s[0] / times_s[1]


def main() -> None:
    rows = []
    with ProcessPoolExecutor() as processes:
        for load in LOADS:
            mean = {prior: fmean(processes.map(partial(gain, load, prior), SEEDS)) for prior in PRIORS}
            rows.append({"load": load, **{prior: f"{value:.3f}" for prior, value in mean.items()}})
    rows.append({"load": "mean", **{prior: f"{fmean(float(row[prior]) for row in rows):.3f}" for prior in PRIORS}})
    print(table(rows))


if __name__ == "__main__":
    main()
