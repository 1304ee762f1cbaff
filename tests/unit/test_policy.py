"""The decision: an oracle, hysteresis, probes, the other modes, and the paper's rule."""

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from er_sglang.policy.acceptance import AcceptanceEstimator
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller, Memory, Reason, State, decide
from er_sglang.policy.paper import PaperRule, Roofline, fit_roofline
from er_sglang.policy.profile import Rung
from tests.profiles import LADDER, flat_profile, make_profile

NO_CREDIT = Memory(probe_credit_s=0.0)


# Reading the weights takes 10 ms (the drafter's 4 ms), computing a token 0.2 ms: drafting pays at small batches only.
PROFILE = make_profile(
    lambda b, c: max(10e-3, 2e-4 * b), lambda b, c: max(4e-3, 2e-4 * b), lambda b, c, g: max(10e-3, 2e-4 * b * (g + 1))
)
SMALL, LARGE = State(batch=4, mean_context_tokens=1000.0), State(batch=128, mean_context_tokens=1000.0)


class Acceptance:
    """Stands in for the estimator: the alphas are as given."""

    def __init__(self, alphas, upper=None):
        self._alphas, self._upper = tuple(alphas), tuple(upper or alphas)

    def alphas(self):
        return self._alphas

    def bounds(self, z):
        return self._alphas, self._upper


def draw(rng: random.Random, alpha: float, batch: int, gamma: int) -> list[int]:
    """Accepted drafts of each request of a cycle."""
    return [next((i for i in range(gamma) if rng.random() >= alpha), gamma) for _ in range(batch)]


def cycle(controller: Controller, rng: random.Random, alpha: float, batch: int, gamma: int) -> float:
    """One cycle, observed; its mean emitted tokens."""
    accepted = draw(rng, alpha, batch, gamma)
    controller.observe(accepted, Rung(gamma))
    return 1.0 + sum(accepted) / batch


times = st.floats(1e-3, 1e-1)


@settings(max_examples=300)
@given(
    target=times,
    draft=times,
    verify=st.lists(times, min_size=5, max_size=5),
    alphas=st.lists(st.floats(0, 1), min_size=7, max_size=7),
)
def test_the_choice_is_the_oracles(target, draft, verify, alphas):
    by_gamma = dict(zip(LADDER, verify))
    profile = make_profile(lambda b, c: target, lambda b, c: draft, lambda b, c, g: by_gamma[g])
    rates = {0: 1.0 / target}
    for gamma in LADDER:
        tokens, reached = 1.0, 1.0
        for alpha in alphas[:gamma]:
            reached *= alpha
            tokens += reached
        rates[gamma] = tokens / (gamma * draft + by_gamma[gamma])
    _, memory = decide(SMALL, profile, {0: Acceptance(alphas)}, PolicyConfig(margin=0.0, patience=0.0), NO_CREDIT)
    assert rates[memory.rung.gamma] == pytest.approx(max(rates.values()))


def test_expected_speedup_is_the_closed_form():
    decision, _ = decide(SMALL, PROFILE, {0: Acceptance([0.9] * 7)}, PolicyConfig(ladder=(3,)), NO_CREDIT)
    assert (decision.gamma, decision.reason) == (3, Reason.PAYS)
    assert decision.expected_speedup == pytest.approx((1 - 0.9**4) / (1 - 0.9) * 10 / (3 * 4 + 10))


def test_margin_is_asked_of_drafting_and_not_between_rungs():
    profile = flat_profile(1.0, 0.5, 1.3)
    acceptance = {0: Acceptance([0.88] * 7)}  # gamma 1: 1.88 / 1.8 = 1.044; gamma 2: 2.65 / 2.3 = 1.154
    assert decide(SMALL, profile, acceptance, PolicyConfig(margin=0.1, patience=0.0), NO_CREDIT)[0].gamma > 1
    assert decide(SMALL, profile, acceptance, PolicyConfig(margin=0.3, patience=0.0), NO_CREDIT)[0].gamma == 0


@pytest.mark.parametrize("mode", ["auto", "always", "threshold", "paper"])
def test_a_batch_that_forbids_drafting_is_not_drafted_for(mode):
    profile = flat_profile(10e-3, 1e-3, 10e-3, gammas=(1, 2, 3, 5, 7, 9, 11))
    controller = Controller(PolicyConfig(mode=mode), profile)
    for state in (LARGE, SMALL):
        controller.decide(state)
    free = controller.decide(SMALL)
    blocked = controller.decide(State(batch=4, mean_context_tokens=1000.0, blocker="grammar"))
    assert free.gamma > 0 and (blocked.gamma, blocked.reason) == (0, Reason.BLOCKED)
    assert controller.decide(SMALL).gamma == free.gamma


def test_a_batch_too_large_to_draft_for_arms_the_papers_toggle():
    profile = flat_profile(10e-3, 1e-3, 10e-3, gammas=(5, 7, 9, 11))
    controller = Controller(PolicyConfig(mode="paper"), profile)
    full = State(batch=40, mean_context_tokens=1000.0, blocker="max-draft-batch")
    assert [controller.decide(state).gamma for state in (SMALL, full, SMALL)] == [0, 0, 5]


def test_a_large_change_acts_at_once_and_both_ways():
    config, acceptance = PolicyConfig(), {0: Acceptance([0.9] * 7)}
    gammas, memory = [], NO_CREDIT
    for state in (SMALL, LARGE, SMALL, LARGE):  # a refilled batch, a drained one
        decision, memory = decide(state, PROFILE, acceptance, config, memory)
        gammas.append(decision.gamma)
    assert gammas[0] == gammas[2] > 0 == gammas[1] == gammas[3]


def test_a_small_advantage_acts_after_patience():
    profile = flat_profile(1.0, 0.4, 1.0)
    acceptance = {0: Acceptance([0.45])}  # gamma 1: 1.45 / 1.4 = 1.036
    config, memory, gammas = PolicyConfig(ladder=(1,), margin=0.0, patience=0.25), NO_CREDIT, []
    for _ in range(10):
        _, memory = decide(SMALL, profile, acceptance, config, memory)
        gammas.append(memory.rung.gamma)
    assert gammas == [0] * 6 + [1] * 4  # 7 x 0.036 exceeds 0.25


@settings(max_examples=200)
@given(path=st.lists(st.floats(0.0, 1.0), min_size=50, max_size=300), patience=st.floats(0.05, 1.0))
def test_switches_are_bounded_by_what_they_gain_for_any_path(path, patience):
    config, memory, switches, gains = PolicyConfig(patience=patience), NO_CREDIT, 0, 0.0
    for alpha in path:
        before, acceptance = memory.rung.gamma, {0: Acceptance([alpha] * 7)}
        ideal = decide(
            SMALL, PROFILE, acceptance, PolicyConfig(patience=0.0), Memory(rung=Rung(before), probe_credit_s=0.0)
        )[1].rung.gamma
        gains += _value(ideal, alpha) / _value(before, alpha) - 1.0
        _, memory = decide(SMALL, PROFILE, acceptance, config, memory)
        switches += memory.rung.gamma != before
    assert switches <= gains / patience + 1e-6


def _value(gamma: int, alpha: float) -> float:
    tokens = sum(alpha**i for i in range(gamma + 1))
    return tokens / PROFILE.costs(SMALL.batch, SMALL.mean_context_tokens).step_s[Rung(gamma)] / (1.01 if gamma else 1.0)


@settings(max_examples=100)
@given(wander=st.lists(st.floats(0.0, 1.0), min_size=400, max_size=400))
def test_no_flapping_within_the_uncertainty_of_the_estimate(wander):
    """64 running requests, known for a while, at the crossover: whatever path the estimate takes between its bounds."""
    estimator = AcceptanceEstimator(1)
    for _ in range(200):
        estimator.observe([1] * 29 + [0] * 35, 1)
    (low,), (high,) = estimator.bounds()
    profile = flat_profile(1.0, 0.44, 1.0)
    config, memory, switches = PolicyConfig(ladder=(1,)), NO_CREDIT, 0
    for u in wander:
        before = memory.rung.gamma
        _, memory = decide(SMALL, profile, {0: Acceptance([low + u * (high - low)])}, config, memory)
        switches += memory.rung.gamma != before
    assert high > 1.44 * 1.01 - 1.0 > low  # the decision is open within these bounds
    assert switches <= 1 + len(wander) * (high - low) / (1.0 + low) / config.patience


def test_a_noisy_estimate_at_the_crossover_switches_rarely():
    rng = random.Random(0)
    profile = flat_profile(1.0, 0.44, 1.0)
    controller, gammas = Controller(PolicyConfig(ladder=(1,)), profile), []
    for _ in range(4000):
        gammas.append(controller.decide(SMALL).gamma)
        if gammas[-1]:
            cycle(controller, rng, 0.45, 4, 1)
    assert sum(a != b for a, b in zip(gammas, gammas[1:])) < 200


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.72])  # 0.72 loses 4 %: hard to rule out, so always worth a probe
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_probes_cost_less_than_their_budget(alpha, batch):
    rng, config = random.Random(1), PolicyConfig()
    profile = make_profile(lambda b, c: 1.0, lambda b, c: 0.7, lambda b, c, g: 1.0 + 0.1 * g)
    controller, state = Controller(config, profile), State(batch=batch, mean_context_tokens=1000.0)
    plain_s, excess_s, probes = 0.0, 0.0, 0
    for _ in range(20_000):
        decision = controller.decide(state)
        if not decision.gamma:
            plain_s += 1.0
            continue
        tokens = cycle(controller, rng, alpha, batch, decision.gamma)
        if decision.probe:
            excess_s += profile.costs(batch, 1000.0).step_s[decision.rung] - tokens
            probes += 1
    assert probes > 5
    assert excess_s < config.probe_budget * plain_s


def test_probes_find_out_that_drafting_pays_again():
    rng, controller = random.Random(0), Controller(PolicyConfig(), PROFILE)
    state = State(batch=8, mean_context_tokens=1000.0)
    for _ in range(2000):
        if gamma := controller.decide(state).gamma:
            cycle(controller, rng, 0.1, 8, gamma)
    assert controller.decide(state).gamma == 0
    drafting = 0
    for _ in range(3000):
        if gamma := controller.decide(state).gamma:
            drafting += 1
            cycle(controller, rng, 0.95, 8, gamma)
    assert drafting > 1500


def test_no_probe_where_not_even_perfect_acceptance_pays():
    controller = Controller(PolicyConfig(), PROFILE)
    assert {controller.decide(LARGE).reason for _ in range(5000)} == {Reason.SLOWER}


def test_a_policy_update_allows_one_burst_at_once():
    rng, controller = (
        random.Random(0),
        Controller(PolicyConfig(probe_budget=0.0, update_keep=0.0, prior_alpha=0.3), PROFILE),
    )
    state = State(batch=16, mean_context_tokens=1000.0)

    def probes() -> int:
        count = 0
        for _ in range(1000):
            decision = controller.decide(state)
            if decision.gamma:
                count += decision.probe
                cycle(controller, rng, 0.1, 16, decision.gamma)
        return count

    first, second = probes(), probes()
    controller.policy_updated()
    assert first > 0 == second and probes() > 0


@pytest.mark.parametrize("state", [SMALL, State(batch=20, mean_context_tokens=2000.0)])
def test_deciding_takes_few_calls(state):
    """Counted, not timed, as machines differ: 300 calls take 30 to 100 us, beside steps of 5 ms and more."""
    controller = Controller(PolicyConfig(), PROFILE.with_attention_window(256, 16), (0, 256))
    calls = []
    sys.setprofile(lambda frame, event, called: calls.append(called) if event in ("call", "c_call") else None)
    try:
        controller.decide(state)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 300


def test_outside_the_table_is_said():
    assert decide(
        State(batch=256, mean_context_tokens=1000.0), PROFILE, {0: Acceptance([0.9] * 7)}, PolicyConfig(), NO_CREDIT
    )[0].outside


def test_simple_modes():
    assert Controller(PolicyConfig(mode="off")).decide(SMALL).gamma == 0
    assert Controller(PolicyConfig(mode="always", fixed_gamma=3)).decide(LARGE).gamma == 3
    threshold = Controller(PolicyConfig(mode="threshold", fixed_gamma=2, threshold_batch=8))
    assert [threshold.decide(state).gamma for state in (SMALL, LARGE, SMALL)] == [2, 0, 2]


def test_gammas_are_those_the_mode_can_take():
    modes = {
        mode: PolicyConfig(mode=mode, fixed_gamma=4).gammas for mode in ("auto", "always", "off", "threshold", "paper")
    }
    assert modes == {"auto": (1, 2, 3, 5, 7), "always": (4,), "off": (), "threshold": (4,), "paper": (5, 7, 9, 11)}


@pytest.mark.parametrize(
    "settings_",
    [
        {"mode": "on"},
        {"ladder": ()},
        {"ladder": (3, 2)},
        {"paper_ladder": (0, 5)},
        {"fixed_gamma": 0},
        {"margin": -0.1},
        {"probe_budget": 1.5},
        {"prior_alpha": 1.0},
        {"half_life_cycles": 0.0},
    ],
)
def test_settings_out_of_range_are_refused(settings_):
    with pytest.raises(ValueError, match=next(iter(settings_))):
        PolicyConfig(**settings_)


def test_a_profile_without_the_ladder_is_refused():
    with pytest.raises(ValueError, match=r"\[9, 11\].*calibrate"):
        Controller(PolicyConfig(mode="paper"), PROFILE)
    with pytest.raises(ValueError, match="calibrate"):
        Controller(PolicyConfig())


# Of 2000 tokens of context, a draft with a window of 256 takes half the time.
WINDOWED = make_profile(
    lambda b, c: 10e-3, lambda b, c: 2e-3 + 1.2e-6 * c, lambda b, c, g: 11e-3, contexts=(128, 320, 8192)
).with_attention_window(256, sink_tokens=64)
LONG = State(batch=16, mean_context_tokens=2000.0)
SHORT = State(batch=16, mean_context_tokens=200.0)


def drive(controller: Controller, rng: random.Random, state: State, alphas: dict[int, float], steps: int) -> list[Rung]:
    """Rungs taken, where drafts with each window are accepted as stated."""
    rungs = []
    for _ in range(steps):
        rung = controller.decide(state).rung
        rungs.append(rung)
        if rung.gamma:
            controller.observe(draw(rng, alphas[rung.window], state.batch, rung.gamma), rung)
    return rungs


@given(full=st.floats(0, 1), windowed=st.floats(0, 1))
def test_the_choice_among_windows_is_the_oracles(full, windowed):
    alphas = {0: full, 256: windowed}
    acceptance = {window: Acceptance([alpha] * 7) for window, alpha in alphas.items()}
    _, memory = decide(LONG, WINDOWED, acceptance, PolicyConfig(margin=0.0, patience=0.0), NO_CREDIT)
    step_s, _ = WINDOWED.costs(LONG.batch, LONG.mean_context_tokens)
    rates = {
        rung: sum(alphas[rung.window] ** i for i in range(rung.gamma + 1)) / seconds for rung, seconds in step_s.items()
    }
    assert len(rates) == 11 and rates[memory.rung] == pytest.approx(max(rates.values()))


def test_a_window_is_found_to_pay_and_left_when_its_acceptance_collapses():
    controller, rng = Controller(PolicyConfig(), WINDOWED, (0, 256)), random.Random(0)
    good = drive(controller, rng, LONG, {0: 0.93, 256: 0.91}, 300)
    collapsed = drive(controller, rng, LONG, {0: 0.93, 256: 0.3}, 300)
    assert sum(rung.window == 256 for rung in good[50:]) > 240
    assert sum(rung.gamma > 0 and rung.window == 0 for rung in collapsed[100:]) > 190
    again = drive(controller, rng, LONG, {0: 0.93, 256: 0.91}, 5000)
    assert sum(rung.window == 256 for rung in again[-1000:]) > 900, "probes find out"


def test_contexts_that_a_window_holds_are_drafted_for_without_it():
    controller, rng = Controller(PolicyConfig(), WINDOWED, (0, 256)), random.Random(0)
    alphas = {0: 0.9, 256: 0.9}
    for _ in range(2):  # long contexts between
        assert {rung.window for rung in drive(controller, rng, SHORT, alphas, 100)} == {0}
        assert drive(controller, rng, LONG, alphas, 300)[-1].window == 256


def test_probes_of_a_window_cost_less_than_their_budget_while_drafting_with_another():
    """The window takes almost as long as full attention, which wins by little: hard to rule out."""
    profile = make_profile(lambda b, c: 10e-3, lambda b, c: 2e-3 + 1e-8 * c, lambda b, c, g: 11e-3)
    profile = profile.with_attention_window(256, sink_tokens=64)
    controller, rng, lost_s, total_s = Controller(PolicyConfig(), profile, (0, 256)), random.Random(0), 0.0, 0.0
    alphas = {0: 0.9, 256: 0.8}
    step_s, _ = profile.costs(LONG.batch, LONG.mean_context_tokens)
    best = max(step_s, key=lambda rung: sum(0.9**i for i in range(rung.gamma + 1)) / step_s[rung] * (rung.window == 0))
    token_s = step_s[best] / sum(0.9**i for i in range(best.gamma + 1))
    drive(controller, rng, LONG, alphas, 200)
    rungs = drive(controller, rng, LONG, alphas, 10_000)
    probes = [rung for rung in rungs if rung.window]
    for rung in rungs:
        total_s += step_s[rung]
        lost_s += (step_s[rung] - sum(alphas[256] ** i for i in range(rung.gamma + 1)) * token_s) * (rung.window > 0)
    assert len(probes) > 5
    assert lost_s < PolicyConfig().probe_budget * total_s


def test_windows_without_step_times_are_refused():
    with pytest.raises(ValueError, match=r"no times of attention window \[512\].*\[0, 256\]"):
        Controller(PolicyConfig(), WINDOWED, (0, 512))
    assert Controller(PolicyConfig(mode="always"), None, (512,)).decide(LONG).rung == Rung(7, 512)
    assert Controller(PolicyConfig(mode="always"), None, (0, 256)).decide(LONG).rung == Rung(7)


ROOFLINE = Roofline(18.9e-3, 7.9e-3, 3e-8, 1.2e-4, 5e-5, 1.5e-4, 2.3e-4)


def test_the_roofline_fit_recovers_a_roofline():
    profile = make_profile(ROOFLINE.target, ROOFLINE.draft, ROOFLINE.verify, gammas=(5, 7, 9, 11))
    fitted = fit_roofline(profile, (5, 7, 9, 11))
    for batch in (1, 16, 50, 128):
        for context in (600, 3000):
            speedup = ROOFLINE.speedup(batch, context, 7, 6.0)
            assert fitted.speedup(batch, context, 7, 6.0) == pytest.approx(speedup, rel=0.03)


def test_the_papers_toggle_is_armed_by_a_full_batch_and_one_way():
    rule = PaperRule(ROOFLINE, (5, 7, 9, 11))
    assert {rule.gamma(batch, 1000.0) for batch in (1, 8, 32)} == {0}  # never above 32 requests: never on
    assert rule.gamma(128, 1000.0) == 0
    crossover = next(batch for batch in range(128, 0, -1) if rule.gamma(batch, 1000.0))
    assert ROOFLINE.speedup(crossover, 1000.0, 5, 5.0) >= 1.05 > ROOFLINE.speedup(crossover + 1, 1000.0, 5, 5.0)
    assert rule.gamma(128, 1000.0) == 5
    rule.next_rollout()
    assert rule.gamma(4, 1000.0) == 0


def test_the_papers_ladder_moves_after_two_rollouts():
    rule, gammas = PaperRule(ROOFLINE, (5, 7, 9, 11)), []
    for rate in (0.95, 0.9, 0.95, 0.95, 0.95, 0.95, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8):
        rule.gamma(40, 1000.0)
        gamma = rule.gamma(1, 1000.0)
        gammas.append(gamma)
        rule.observe(accepted=round(1000 * gamma * rate), requests=1000)
        rule.next_rollout()
    assert gammas == [5, 5, 5, 5, 7, 7, 9, 9, 9, 7, 7, 5, 5]
