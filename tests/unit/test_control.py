"""What a running server may be switched to, and that a refusal says why."""

from dataclasses import replace

import pytest

from er_sglang.errors import ConfigError
from er_sglang.policy.config import PolicyConfig
from er_sglang.steering.control import Control, as_name, replaced, spelled_out

AUTO = Control(
    policy=PolicyConfig(mode="auto", ladder=(1, 2, 3), fixed_gamma=3, threshold_batch=9), simulated_acceptance=None
)
SIMULATED = replace(AUTO, simulated_acceptance={0: 0.9, 256: 0.8})


def change(settings, now=AUTO, prepared=(1, 2, 3), measured=(1, 2, 3)):
    return replaced(now, {"self_quant": settings}, prepared=prepared, measured=measured)


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "off"},
        {"mode": "always", "fixed_gamma": 2},
        {"mode": "threshold", "threshold_batch": 4},
        {"mode": "paper", "paper_ladder": [1, 3]},
        {"mode": "cycle", "cycle": [0, 3]},
        {"margin": 0.1, "ladder": [2]},
    ],
)
def test_settings_named_change_and_the_others_stay(settings):
    wanted = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    assert change(settings) == replace(AUTO, policy=replace(AUTO.policy, **wanted))


def test_settings_in_a_name():
    """The form for SGLang that lets only numbers through."""
    settings = {"mode": "cycle", "cycle": [0, 3]}
    assert spelled_out({as_name(settings): 1}) == spelled_out({"self_quant": settings}) == {"self_quant": settings}
    assert spelled_out({"pp_max_micro_batch_size": 8}) == {"pp_max_micro_batch_size": 8}
    with pytest.raises(ConfigError, match="must be a JSON object"):
        change(spelled_out({"self_quant={mode: off}": 1})["self_quant"])


def test_the_cycle_goes_with_its_mode():
    cycling = change({"mode": "cycle", "cycle": [3, 0]})
    assert change({"cycle": [1]}, cycling).policy.cycle == (1,)
    assert change({"mode": "off"}, cycling).policy == replace(AUTO.policy, mode="off")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mode": "always", "fixed_gamma": 5}, r"would draft \[5\].* prepared no graphs; it did for \[1, 2, 3\]"),
        ({"ladder": [1, 7]}, r"would draft \[7\]"),
        ({"mode": "paper"}, r"would draft \[5, 7, 9, 11\]"),
        ({"mode": "eagle"}, "choose one of auto"),
        ({"mood": "off"}, "unknown setting mood"),
        ({"mode": "off", "margin": "much"}, "margin must be of type float"),
        ({"margin": float("nan")}, "margin must be a finite number"),
        ({"ladder": [3, 1]}, "must be increasing"),
        ({"mode": "cycle"}, "give both or neither"),
        ({"prior_alpha": 1.5}, "prior_alpha must lie"),
        ({}, "JSON object of settings"),
        ("off", "JSON object of settings"),
        ({"simulate_acceptance": 0.5}, "this server samples from the policy"),
        ({"mode": "off", "simulate_acceptance": None}, "this server samples from the policy"),
    ],
)
def test_what_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        change(settings)


def test_a_mode_that_decides_by_step_times_needs_them():
    off = replace(AUTO, policy=replace(AUTO.policy, mode="off"))
    assert change({"mode": "always"}, off, measured=()).policy.mode == "always"
    with pytest.raises(ConfigError, match="has none for gamma"):
        change({"mode": "auto"}, off, measured=())


def test_nothing_else_may_come_along():
    with pytest.raises(ConfigError, match="without pp_max_micro_batch_size"):
        replaced(AUTO, {"self_quant": {"mode": "off"}, "pp_max_micro_batch_size": 8}, prepared=(), measured=())


def test_another_acceptance_only_where_one_is_simulated():
    assert change({"simulate_acceptance": 1}, SIMULATED).simulated_acceptance == {0: 1.0, 256: 1.0}
    apart = {"0": 0.5, "256": 0.25}
    assert change({"simulate_acceptance": apart}, SIMULATED).simulated_acceptance == {0: 0.5, 256: 0.25}
    for bad in (None, True, "0.5", -0.1, 1.1, float("nan"), {"0": 0.5}, {"0": 0.5, "256": 2}):
        with pytest.raises(ConfigError, match="number from 0 to 1"):
            change({"simulate_acceptance": bad}, SIMULATED)
    assert change({"mode": "off"}, SIMULATED) == replace(SIMULATED, policy=replace(AUTO.policy, mode="off"))
