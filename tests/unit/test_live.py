"""Live step times correct the profile: both ways, in spite of pauses, and not where the whole card is slow."""

import random

import pytest

from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller, State
from er_sglang.policy.live import LARGEST_RATIO, LiveFactor
from tests.profiles import flat_profile

STATE = State(batch=16, mean_context_tokens=1000.0)
SHARED_EVERY = 64  # steps
# Of gamma 3 at acceptance 0.9: 3.44 tokens in 2.4 steps' time.
PROFILE = flat_profile(10e-3, 4e-3, 12e-3, gammas=(3,))


def serve(steps: int, cycle_slowdown, live: LiveFactor, controller: Controller, rng: random.Random) -> list[int]:
    """Gammas taken by a server whose cycles take `cycle_slowdown(step)` times as long as its profile says."""
    gammas, step_s = [], controller.profile.costs(STATE.batch, STATE.mean_context_tokens).step_s
    for step in range(steps):
        if step % SHARED_EVERY == 0:
            controller.cycle_factor = live.value
        rung = controller.decide(STATE).rung
        gammas.append(rung.gamma)
        noise = rng.lognormvariate(0.0, 0.03)
        live.observe(rung.gamma > 0, step_s[rung], step_s[rung] * noise * (cycle_slowdown(step) if rung.gamma else 1.0))
        if rung.gamma:
            accepted = [next((i for i in range(rung.gamma) if rng.random() > 0.9), rung.gamma) for _ in range(16)]
            controller.observe(accepted, rung)
    return gammas


def test_a_cell_that_is_slower_than_plain_is_left_and_tried_again_when_it_no_longer_is():
    live, controller, rng = LiveFactor(), Controller(PolicyConfig(ladder=(3,)), PROFILE), random.Random(0)
    assert sum(gamma > 0 for gamma in serve(1000, lambda _: 1.0, live, controller, rng)) > 950
    slow = serve(20_000, lambda _: 1.6, live, controller, rng)  # 0.9 x plain
    assert sum(gamma > 0 for gamma in slow[2000:]) < 0.15 * 18_000
    again = serve(20_000, lambda _: 1.0, live, controller, rng)
    assert sum(gamma > 0 for gamma in again[-2000:]) > 1900


def test_a_slow_card_slows_both():
    live = LiveFactor()
    for step in range(1000):
        live.observe(step % 2 == 0, 10e-3, 15e-3)
    assert live.value == pytest.approx(1.0, abs=0.01)


def test_a_pause_counts_as_one_slow_step():
    live = LiveFactor()
    for step in range(400):
        live.observe(step % 2 == 0, 10e-3, 10e-3)
    live.observe(True, 10e-3, 100.0)
    assert 1.0 < live.value < LARGEST_RATIO ** (1 / 100)


def test_nothing_known_is_the_profile_and_little_is_doubted():
    live = LiveFactor()
    assert live.value == 1.0
    live.observe(True, 10e-3, 20e-3)
    assert 1.0 < live.value < 1.1
