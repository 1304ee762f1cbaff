"""What `auto` loses to one that knows every acceptance and changes at once, and what other settings would bring; simulated, six draws
each: `python fused-8-oracle.py`, from this folder."""

from er_sglang.policy.acceptance import AcceptanceEstimator
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile
from er_sglang.tools.simulator import simulate
from er_sglang.tools.workload import draw_lengths, make_requests

ACCEPTANCE = {
    "stated": (0.93, {128: 0.961, 256: 0.987, 512: 0.998}),
    "1.5B's": (0.906, {256: 0.961, 1024: 0.978}),
}
WORKLOADS = {
    "7b short": ("7b-fused-8-rollout", 128, "lognormal:200:0.8:1000"),
    "8b short": ("8b-fused-8-rollout", 128, "lognormal:200:0.8:1000"),
    "8b long tail": ("8b-fused-8-long-tail", 64, "lognormal:400:1.2:8000"),
    "8b 32 long": ("8b-fused-8-32-long", 32, "lognormal:2500:0.6:8192"),
}
SETTINGS = (
    {},
    {"patience": 0.1},
    {"patience": 1.0},
    {"half_life_cycles": 48.0},
    {"half_life_cycles": 96.0},
    {"prior_weight": 16.0},
    {"prior_window": 0.985},
    {"probe_budget": 0.0},
    {"probe_budget": 0.02},
)


def rollouts_s(
    folder: str, requests: int, lengths: str, alpha: float, windows: dict, config: PolicyConfig, knows: bool
) -> float:
    profile, total_s = Profile.read(f"{folder}/profile.json"), 0.0
    for seed in range(6):
        controller = Controller(config, profile, (0, *sorted(windows)))
        if knows:
            for window in controller.windows:
                controller.acceptance[window] = AcceptanceEstimator(
                    max(config.gammas), prior_alpha=alpha * windows.get(window, 1.0), prior_weight=1e7
                )
        drawn = make_requests(draw_lengths(lengths, requests, seed=seed), (alpha,), prompt_tokens=128)
        total_s += simulate(profile, drawn, controller, window_acceptance=windows, seed=seed).time_s
    return total_s


print(
    "gain over plain decoding: knowing it all; then auto with",
    *(setting or "defaults" for setting in SETTINGS),
    sep=", ",
)
for name, (alpha, windows) in ACCEPTANCE.items():
    for workload, what in WORKLOADS.items():
        plain_s = rollouts_s(*what, alpha, windows, PolicyConfig(mode="off"), False)
        times_s = [rollouts_s(*what, alpha, windows, PolicyConfig(patience=0.0, probe_budget=0.0), True)]
        times_s += [rollouts_s(*what, alpha, windows, PolicyConfig(**setting), False) for setting in SETTINGS]
        print(f"{name:8} {workload:14}", *(f"{plain_s / time_s:.3f}" for time_s in times_s), flush=True)
