"""The acceptance estimate: closed forms, convergence, survivor bias, staleness."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from er_sglang.policy.acceptance import AcceptanceEstimator, emitted


def draw_cycle(rng: random.Random, alphas, batch: int, gamma: int) -> list[int]:
    accepted = []
    for _ in range(batch):
        count = 0
        while count < gamma and rng.random() < alphas[count]:
            count += 1
        accepted.append(count)
    return accepted


@given(alpha=st.floats(0.0, 0.99), gamma=st.integers(0, 15))
def test_emitted_is_the_geometric_series(alpha, gamma):
    assert emitted([alpha] * gamma)[gamma] == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha))


@pytest.mark.parametrize("alphas", [(0.9,) * 5, (0.95, 0.9, 0.7, 0.5, 0.2), (0.3,) * 5])
def test_expected_tokens_agree_with_simulation(alphas):
    rng, estimator, tokens, cycles = random.Random(1), AcceptanceEstimator(5, half_life_cycles=500.0), 0, 400
    for _ in range(cycles):
        accepted = draw_cycle(rng, alphas, batch=64, gamma=5)
        estimator.observe(accepted, 5)
        tokens += sum(accepted) + 64
    assert estimator.alphas() == pytest.approx(alphas, abs=0.05)
    for gamma in range(6):
        assert emitted(estimator.alphas())[gamma] == pytest.approx(emitted(alphas)[gamma], rel=0.02)
    assert emitted(estimator.alphas())[5] == pytest.approx(tokens / (64 * cycles), rel=0.02)


def test_starts_from_the_prior():
    estimator = AcceptanceEstimator(3, prior_alpha=0.7)
    assert estimator.alphas() == pytest.approx((0.7,) * 3)


def test_deep_positions_borrow_from_shallow_ones():
    estimator = AcceptanceEstimator(7)
    for _ in range(50):
        estimator.observe([1, 0, 1, 1] * 8, gamma=1)
    alphas = estimator.alphas()
    assert alphas[0] == pytest.approx(0.75, abs=0.01)
    assert alphas[1:] == pytest.approx((alphas[0],) * 6)
    lower, upper = estimator.bounds()
    assert upper[0] - lower[0] < 0.1 < upper[1] - lower[1]


def test_bounds_cover_the_truth_as_often_as_stated():
    missed, runs = 0, 300
    for seed in range(runs):
        rng, estimator = random.Random(seed), AcceptanceEstimator(1)
        alpha = rng.uniform(0.2, 0.95)
        for _ in range(100):
            estimator.observe(draw_cycle(rng, (alpha,), batch=4, gamma=1), 1)
        lower, upper = estimator.bounds(z=1.645)
        missed += not lower[0] <= alpha <= upper[0]
    assert missed / runs < 0.14  # two-sided 90 %, and some for the decay of old evidence


@pytest.mark.parametrize("survivors", [1, 4])
def test_survivors_take_over_within_a_few_dozen_cycles(survivors):
    easy, hard, estimates = (0.95,) * 3, (0.55,) * 3, []
    for seed in range(20):
        rng, estimator = random.Random(seed), AcceptanceEstimator(3)
        for _ in range(100):
            estimator.observe(draw_cycle(rng, easy, batch=64, gamma=3), 3)
        assert emitted(estimator.alphas())[3] == pytest.approx(emitted(easy)[3], rel=0.04)
        for _ in range(36):
            estimator.observe(draw_cycle(rng, hard, batch=survivors, gamma=3), 3)
        estimates.append(emitted(estimator.alphas())[3])
    left = sum(estimates) / len(estimates) - emitted(hard)[3]
    assert left < 0.45 * (emitted(easy)[3] - emitted(hard)[3])


def test_age_widens_and_drifts_to_the_prior():
    estimator = AcceptanceEstimator(2, prior_alpha=0.8, stale_half_life_cycles=100.0)
    for _ in range(100):
        estimator.observe([0] * 16, gamma=2)
    spreads, alphas = [], []
    for _ in range(4):
        lower, upper = estimator.bounds()
        spreads.append(upper[0] - lower[0])
        alphas.append(estimator.alphas()[0])
        for _ in range(400):
            estimator.age()
    assert alphas == sorted(alphas) and min(spreads) == spreads[0]
    for _ in range(5000):
        estimator.age()
    assert estimator.alphas() == pytest.approx((0.8, 0.8))


def test_reset_forgets_the_stated_share():
    estimator = AcceptanceEstimator(1)
    estimator.observe([1] * 100, 1)
    estimator.reset(keep=0.25)
    assert estimator.snapshot()["tried"] == [25.0]
    estimator.reset(keep=0.0)
    assert estimator.alphas() == (0.8,)


@given(st.lists(st.tuples(st.integers(1, 5), st.lists(st.integers(0, 1), min_size=1, max_size=6)), max_size=30))
def test_estimates_stay_probabilities_inside_their_bounds(cycles):
    estimator = AcceptanceEstimator(5)
    for gamma, marks in cycles:
        estimator.observe([gamma * mark for mark in marks], gamma)
    lower, upper = estimator.bounds()
    for low, alpha, high in zip(lower, estimator.alphas(), upper):
        assert 0.0 <= low <= alpha <= high <= 1.0


@pytest.mark.parametrize(("accepted", "gamma"), [([4], 3), ([-1], 3), ([], 3), ([1], 0), ([1], 9)])
def test_an_impossible_verdict_is_refused(accepted, gamma):
    with pytest.raises(ValueError, match="accepted counts"):
        AcceptanceEstimator(8).observe(accepted, gamma)
