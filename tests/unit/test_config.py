"""Settings: defaults, what follows the largest gamma, precedence, and refusals that name the setting."""

import json

import pytest

from er_sglang.config import (
    AUTO_WINDOWS,
    CACHE_ENV,
    CONFIG_ENV,
    SIMULATE_ACCEPTANCE_ENV,
    cache_folder,
    load_config,
    simulated_acceptance,
)
from er_sglang.errors import ConfigError


def load(settings: dict, gamma_max: int | None = None):
    return load_config(None, gamma_max, {CONFIG_ENV: json.dumps(settings)})


def test_defaults():
    config = load_config(None, None, {})
    assert (config.policy.mode, config.gamma_max) == ("auto", 7)
    assert config.policy.gammas == (1, 2, 3, 5, 7) and config.policy.fixed_gamma == 7
    assert (config.drafter.weights, config.drafter.head) == ("int4", "int4_rescored")
    assert config.profile is None and config.trace is None


@pytest.mark.parametrize(
    ("gamma_max", "ladder"), [(1, (1,)), (4, (1, 2, 3)), (7, (1, 2, 3, 5, 7)), (15, (1, 2, 3, 5, 7, 11, 15))]
)
def test_open_draft_lengths_follow_the_largest_gamma(gamma_max, ladder):
    assert load({"policy": {"mode": "auto"}}, gamma_max).policy.gammas == ladder
    assert load({"policy": {"mode": "always"}}, gamma_max).policy.gammas == (gamma_max,)
    assert load({"policy": {"mode": "threshold"}, "gamma_max": gamma_max}).policy.gammas == (gamma_max,)


@pytest.mark.parametrize("mode", ["auto", "always", "threshold", "off"])
def test_read_again_with_the_gamma_that_was_found_settings_are_the_same(mode):
    """As ServerArgs keep it for the schedulers."""
    found = load({"policy": {"mode": mode}})
    assert load({"policy": {"mode": mode}}, found.gamma_max) == found


def test_given_draft_lengths_hold():
    assert load({"policy": {"mode": "auto", "ladder": [2, 4]}}, 5).policy.gammas == (2, 4)
    assert load({"policy": {"mode": "always", "fixed_gamma": 2}}, 5).policy.gammas == (2,)
    assert load({"policy": {"mode": "cycle", "cycle": [3, 0, 1, 3]}}, 5).policy.gammas == (1, 3)
    assert load({"policy": {"mode": "off"}}, 5).policy.gammas == ()


@pytest.mark.parametrize(
    "policy",
    [
        {"mode": "auto", "ladder": [1, 4]},
        {"mode": "always", "fixed_gamma": 4},
        {"mode": "cycle", "cycle": [0, 4]},
        {"mode": "paper"},
    ],
)
def test_draft_lengths_above_the_largest_gamma_are_refused(policy):
    with pytest.raises(ConfigError, match=r"more than --speculative-num-steps \(3\)"):
        load({"policy": policy}, 3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"mode": "auto"}, "unknown setting mode; known: calibration_s, drafter"),
        ({"policy": {"modus": "auto"}}, "policy: unknown setting modus"),
        ({"drafter": {"bits": 4}}, "drafter: unknown setting bits"),
        ({"policy": "auto"}, "policy must be a JSON object"),
        ({"policy": {"ladder": 3}}, "ladder must be a list of integers"),
        ({"policy": {"ladder": [1, 2.5]}}, "ladder must be a list of integers"),
        ({"policy": {"margin": "0.1"}}, "margin must be of type float"),
        ({"max_draft_batch": True}, "max_draft_batch must be of type int"),
        ({"gamma_max": "3"}, "gamma_max must be of type int"),
        ({"trace": 3}, "trace must be of type str"),
        ({"trace_max_mb": 0}, "trace_max_mb is 0"),
        ({"policy": {"mode": "on"}}, "mode is 'on'"),
        ({"policy": {"ladder": [3, 2]}}, "ladder is"),
        ({"policy": {"mode": "cycle"}}, "give both or neither"),
        ({"policy": {"cycle": [1]}}, "give both or neither"),
        ({"policy": {"mode": "cycle", "cycle": [1, -1]}}, "0 or more"),
        ({"drafter": {"weights": "int3"}}, "drafter.weights is 'int3'"),
        ({"drafter": {"head": "fp8"}}, "drafter.head is 'fp8'"),
        ({"drafter": {"group_size": 100}}, "drafter.group_size is 100"),
        ({"drafter": {"attention_window": -1}}, "drafter.attention_window is -1"),
        ({"drafter": {"attention_window": "wide"}}, "drafter.attention_window is 'wide'; choose \"auto\""),
        ({"drafter": {"attention_window": 8.5}}, "attention_window must be of type int or str"),
        ({"drafter": {"window_by": "age"}}, "drafter.window_by is 'age'; choose one of attention, recency"),
        ({"max_draft_batch": 0}, "max_draft_batch is 0"),
        ({"gamma_max": 0}, "--speculative-num-steps is 0"),
        ({"gamma_max": 16}, "--speculative-num-steps is 16"),
    ],
)
def test_refusals_name_the_setting(settings, named):
    with pytest.raises(ConfigError, match=named):
        load(settings)


def test_an_integer_is_a_number():
    assert load({"policy": {"margin": 0}}).policy.margin == 0


def test_the_environment_replaces_the_file(tmp_path):
    path, other = tmp_path / "config.json", tmp_path / "other.json"
    path.write_text('{"gamma_max": 2}')
    other.write_text('{"gamma_max": 3}')
    assert load_config(str(path), None, {}).gamma_max == 2
    assert load_config(str(path), None, {CONFIG_ENV: str(other)}).gamma_max == 3
    assert load_config(str(path), None, {CONFIG_ENV: '{"gamma_max": 4}'}).gamma_max == 4


def test_two_largest_gammas_are_refused():
    assert load({"gamma_max": 4}, 4).gamma_max == 4
    with pytest.raises(ConfigError, match="sets gamma_max to 4 but --speculative-num-steps is 5"):
        load({"gamma_max": 4}, 5)


@pytest.mark.parametrize("text", ["[1]", "{", '"off"'])
def test_what_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="JSON"):
        load_config(str(tmp_path / "config.json"), None, {})


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match="cannot read"):
        load_config("nowhere.json", None, {})


def test_simulated_acceptance():
    assert simulated_acceptance((0,), {}) is None
    assert simulated_acceptance((0, 256), {SIMULATE_ACCEPTANCE_ENV: "0.9"}) == {0: 0.9, 256: 0.9}
    assert simulated_acceptance((0, 256), {SIMULATE_ACCEPTANCE_ENV: '{"256": 0.8, "0": 0.9}'}) == {0: 0.9, 256: 0.8}
    for text in ("1.1", "high", '{"0": 0.9}', '{"0": 0.9, "256": 2}', '{"0": 0.9, "256": 0.9, "512": 0.9}'):
        with pytest.raises(ConfigError, match="from 0 to 1.* for each attention window, 0, 256"):
            simulated_acceptance((0, 256), {SIMULATE_ACCEPTANCE_ENV: text})


def test_the_windows_are_chosen_from_or_given():
    assert load({}).drafter.windows == AUTO_WINDOWS
    assert load({"drafter": {"attention_window": 0}}).drafter.windows == (0,)
    assert load({"drafter": {"attention_window": 512}}).drafter.windows == (512,)


def test_the_cache_can_be_moved(tmp_path):
    assert cache_folder({CACHE_ENV: str(tmp_path)}) == tmp_path
    assert cache_folder({}).parts[-2:] == (".cache", "er_sglang")
