"""The measured policy in a real server: calibration, its cache, switching both ways, and what is seen of it.

Real step times of a tiny model on a CPU never make drafting pay, so the second server decides by crafted ones: drafting
gains for up to CROSSOVER requests and loses beyond.
"""

from __future__ import annotations

import json
from collections import Counter
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from er_sglang.bench.arms import Arm, start_policy
from er_sglang.calibration import measure
from er_sglang.cli import main
from er_sglang.config import CACHE_ENV, CONFIG_ENV, SIMULATE_ACCEPTANCE_ENV, SelfQuantConfig
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile, Rung
from er_sglang.steering.agreement import CHECK_EVERY_STEPS, Agreement
from er_sglang.steering.metrics import Metrics
from er_sglang.steering.steering import Steering
from tests.host.servers import ARGS, ENV, TWO_RANKS, self_quant
from tests.profiles import flat_profile

GAMMA_MAX = 3
AUTO = {"mode": "auto", "live_times": False}  # times are crafted
CROSSOVER = 8
PROMPT = [7, 30, 30, 2, 51]
MANY, FEW = 24, 3
SHORT, LONG = 16, 200
LONGER = 600  # many times what a change and its answer take, on a busy machine too


def batch(long: int = LONG) -> dict:
    """A batch with a tail: MANY + FEW requests run at first, FEW at last."""
    settings = [
        {"temperature": 1, "max_new_tokens": length, "ignore_eos": True} for length in [SHORT] * MANY + [long] * FEW
    ]
    return {"input_ids": [PROMPT] * len(settings), "sampling_params": settings}


def load(server, **extra) -> list[dict]:
    return server.generate({**batch(), **extra})


def load_and_change(server, changes: list[dict]) -> list[int]:
    """Change the policy again and again while a batch runs; the lengths of its answers."""
    chunks = server.stream(batch(LONGER))
    first = next(chunks)  # it runs
    for settings in changes:
        server.change_self_quant(settings)
    answers = {chunk["index"]: chunk["output_ids"] for chunk in [first, *chunks]}
    return [len(answers[i]) for i in range(MANY + FEW)]


def crafted(profile: Profile, path, **fingerprint) -> None:
    content = {
        "format": 2,
        "fingerprint": {**profile.fingerprint, **fingerprint},
        "batches": [1, CROSSOVER, CROSSOVER + 1, 64],
        "contexts_tokens": [1, 1000],
        "forward_s": {"0": [[1e-2] * 2] * 4, **{str(g): [[1e-2] * 2] * 2 + [[1e-1] * 2] * 2 for g in profile.gammas}},
        "draft_s": {str(window): [[1e-4] * 2] * 4 for window in profile.windows},
        "unavailable": [],
        "outliers": [],
    }
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def calibrated(qwen3, folder):
    """The profile that `er-sglang calibrate` measured and the cache that it left."""
    cache, out = folder / "cache", folder / "profile.json"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENV, CACHE_ENV: str(cache)}.items():
            patch.setenv(name, value)
        words = [
            word for name, value in ARGS.items() for word in (f"--{name}", *([] if value is True else [str(value)]))
        ]
        patch.setenv(CONFIG_ENV, json.dumps({"max_draft_batch": 2048, "policy": AUTO}))
        command = [
            "calibrate",
            "--model-path",
            str(qwen3),
            "--out",
            str(out),
            "--",
            "--speculative-num-steps",
            str(GAMMA_MAX),
        ]
        assert main([*command, *words]) == 0
    return Profile.load(out), cache


@pytest.fixture(scope="module")
def steered(qwen3, folder, calibrated):
    """A server that finds the crafted times in its cache."""
    profile, cache = calibrated
    (cached,) = (cache / "profiles").iterdir()
    crafted(profile, cached)
    trace = folder / "trace.jsonl"
    with self_quant(
        qwen3,
        folder / "steered.log",
        {"trace": str(trace), "policy": AUTO},
        GAMMA_MAX,
        args={"enable-metrics": True, "enable-return-hidden-states": True},
        env={CACHE_ENV: str(cache)},
    ) as server:
        server.trace = trace
        yield server


def test_calibration_measures_every_gamma(calibrated):
    profile, cache = calibrated
    assert profile.gammas == (1, 2, 3) and len(profile.batches) > 1 and len(profile.contexts_tokens) > 1
    assert not profile.unavailable
    assert profile.fingerprint["gammas"] == [1, 2, 3] and profile.fingerprint["tp_size"] == 1
    cells = [profile.costs(batch, context) for batch in profile.batches for context in profile.contexts_tokens]
    assert not any(cell.outside for cell in cells)
    # A verify computes more than a plain step, and a chain of drafts takes as long as several plain steps: most cells show
    # it, each measured a few times, on a core that others want.
    for less, more, ratio in ((0, 1, 1), (1, 3, 1), (0, 3, 2)):
        assert median(cell.step_s[Rung(more)] / cell.step_s[Rung(less)] for cell in cells) > ratio


def test_another_kv_cache_is_another_profile():
    """A small one holds fewer cells; its profile must not stand for a large one's."""

    def path(tokens: int):
        subject = SimpleNamespace(
            device=torch.device("cpu"),
            config=SelfQuantConfig(),
            server_args=SimpleNamespace(page_size=1),
            runner=SimpleNamespace(model_config=SimpleNamespace(context_len=2048), max_total_num_tokens=tokens),
            req_to_token=torch.empty(65, 2048),
            graph_batches=[],
        )
        return measure._cached({"device": "a card"}, measure._grid(subject))

    assert path(100_000) == path(200_000) != path(4_000)


def test_a_second_start_reads_the_cache(steered):
    log = steered.log_path.read_text(errors="replace")
    assert "Measuring step times" not in log
    assert "Step times are those of" in log


def test_it_switches_both_ways(steered):
    before = steered.self_quant()
    for _ in range(2):
        load(steered)
    after = steered.self_quant()
    assert after["switches"] - before["switches"] >= 3  # on in the first tail, off for the second batch, on in its tail
    steps = [json.loads(line) for line in steered.trace.read_text().splitlines()]
    full = [step for step in steps if step["batch"] == MANY + FEW]
    tail = [step for step in steps if step["batch"] == FEW]
    assert sum(step["gamma"] == 0 for step in full) / len(full) > 0.8
    assert sum(step["gamma"] > 0 for step in tail) / len(tail) > 0.8
    assert {step["reason"] for step in tail} <= {"pays", "held", "slower", "probe"}


def test_the_trace_and_the_counters_agree(steered):
    load(steered, return_hidden_states=True)
    state = steered.self_quant()
    steps = [json.loads(line) for line in steered.trace.read_text().splitlines()]
    assert Counter(f"gamma={step['gamma']}:{step['reason']}" for step in steps) == state["decisions"]
    assert sum(step["accepted"] for step in steps) == state["accepted_tokens"]
    assert sum(step["accepted"] + step["batch"] for step in steps) == state["emitted_tokens"]
    assert sum(step["reason"] == "probe" for step in steps) == state["probes"]
    assert state["decisions"]["gamma=0:hidden-states"] >= LONG - 1
    assert not any(step["gamma"] for step in steps if step["reason"] == "hidden-states")
    assert all(step["expected_speedup"] > 1 for step in steps if step["reason"] == "pays")


def test_predicted_and_measured_speedup_are_told(steered):
    load(steered)
    state = steered.self_quant()
    assert state["mode"] == "auto" and state["profile"].endswith(".json")
    assert state["predicted_speedup"] > 1 and state["measured_speedup"] > 0 and state["plain_step_ratio"] > 0
    learned = state["acceptance"]["0"]  # by attention window; no context is longer than any
    assert 0 < learned["alpha"][0] < 1 and learned["tried"][0] > 0
    exported = {
        line.split("{")[0]: line for line in steered.metrics().splitlines() if "self_quant" in line and line[0] != "#"
    }
    for name, value in (("switches", state["switches"]), ("probes", state["probes"]), ("gamma", state["gamma"])):
        line = exported.get(f"sglang:self_quant_{name}_total") or exported[f"sglang:self_quant_{name}"]
        assert float(line.split()[-1]) == value
    assert {"sglang:self_quant_predicted_speedup", "sglang:self_quant_measured_speedup"} <= exported.keys()


def decisions(server, before: dict) -> dict[str, int]:
    """Steps by decision since a snapshot."""
    return dict(Counter(server.self_quant()["decisions"]) - Counter(before["decisions"]))


def test_the_policy_changes_while_serving(steered):
    """off, always, auto: the decisions follow, from one batch to the next and within one; counters and traces run
    on."""
    start = steered.self_quant()
    steered.change_self_quant({"mode": "off"})
    load(steered)
    off = steered.self_quant()
    assert decisions(steered, start).keys() == {"gamma=0:off"}
    assert off["mode"] == off["policy"]["mode"] == "off" and off["settings_version"] == start["settings_version"] + 1
    assert off["acceptance"]["0"]["tried"] == []  # as a server started so would have it

    steered.change_self_quant({"mode": "always", "fixed_gamma": 2})
    load(steered)
    assert decisions(steered, off).keys() == {"gamma=2:always"}

    always = steered.self_quant()
    steered.change_self_quant({"mode": "auto"})
    assert steered.self_quant()["policy"] == {**start["policy"], "fixed_gamma": 2}
    load(steered)
    auto = decisions(steered, always)
    assert auto.keys() <= {
        f"gamma={gamma}:{reason}" for gamma in range(4) for reason in ("pays", "held", "slower", "probe")
    }
    assert any(name.startswith("gamma=3") for name in auto) and any(name.startswith("gamma=0") for name in auto)

    steps = [json.loads(line) for line in steered.trace.read_text().splitlines()]
    modes = {step["settings_version"]: step["mode"] for step in steps}
    assert [modes[start["settings_version"] + i] for i in range(4)] == ["auto", "off", "always", "auto"]
    assert len({(step["settings_version"], step["mode"]) for step in steps}) == len(modes)


def test_the_policy_changes_within_a_batch(steered):
    steered.change_self_quant({"mode": "always", "fixed_gamma": 3})
    before = steered.self_quant()
    changes = [{"fixed_gamma": 1}, {"mode": "off"}, {"mode": "always", "fixed_gamma": 3}, {"mode": "off"}] * 5
    assert load_and_change(steered, [*changes, {"mode": "auto"}]) == [SHORT] * MANY + [LONGER] * FEW
    assert decisions(steered, before).keys() >= {"gamma=1:always", "gamma=0:off", "gamma=3:always"}
    assert steered.self_quant()["settings_version"] == before["settings_version"] + 21


def test_steps_in_flight_are_learned_from_by_the_policy_that_decided_them():
    """Under overlap scheduling, the default on GPUs; the new policy may not even know their gammas."""
    always = Controller(PolicyConfig(mode="always", fixed_gamma=3))
    steering = Steering(always, Metrics(3), windows=(0,), max_draft_batch=8, agreement=Agreement(None), trace=None)
    for config in (PolicyConfig(mode="off"), PolicyConfig(mode="always", fixed_gamma=2)):
        steering.launch([10, 10], None, {})
        steering.change_settings(config)
    steering.launch([10, 10], None, {})
    assert steering.in_flight_tokens == 4 + 1 + 3
    for accepted in ([3, 1], [0, 0], [2, 0]):
        steering.finished(accepted)
    assert always.acceptance[0].snapshot()["tried"] == [2.0, 2.0, 1.0]
    assert steering.controller.acceptance[0].snapshot()["tried"] == [2.0, 1.0]


def test_acceptance_is_not_learned_from_riders():
    """They accept nothing, since nothing was drafted for them."""
    always = Controller(PolicyConfig(mode="always", fixed_gamma=2))
    steering = Steering(always, Metrics(3), windows=(0,), max_draft_batch=8, agreement=Agreement(None), trace=None)
    assert steering.launch([10, 10, 10], None, {1: "grammar"}).rung.gamma == 2
    steering.finished([2, 0, 1])
    assert always.acceptance[0].snapshot()["tried"] == [2.0, 2.0]


@pytest.mark.parametrize("overlap", [True, False])
def test_what_the_host_does_between_steps_is_not_their_duration(overlap, monkeypatch):
    """With a small policy, ending a request takes as long as a step. Were plain steps blamed for it, which at the head of a
    rollout end many, cycles would be thought to pay where they do not."""
    now_s = 100.0
    monkeypatch.setattr("er_sglang.steering.steering.time.perf_counter", lambda: now_s)
    off = Controller(PolicyConfig(mode="off"), flat_profile(target_s=0.010))
    steering = Steering(off, Metrics(3), windows=(0,), max_draft_batch=64, agreement=Agreement(None), trace=None)
    running, in_flight, host_s = 48, [], 5.0  # a prefill goes before
    for ends in [0, 0, 3, 0, 0, 1, 1, 0, 0] * 8:
        in_flight.append(steering.launch([10] * running, None, {}).batch)
        if overlap and len(in_flight) == 1:
            continue
        now_s += 0.010 + host_s
        steering.finished([0] * in_flight.pop(0))
        running, host_s = running - ends, 0.010 * ends
    assert steering.snapshot()["plain_step_ratio"] == pytest.approx(1.0)
    assert steering.snapshot()["cycle_factor"] == pytest.approx(1.0)


def test_a_pause_for_an_update_is_not_the_duration_of_a_step(monkeypatch):
    """SGLang reports the step in flight after the pause, when the next one has been launched."""
    now_s = 100.0
    monkeypatch.setattr("er_sglang.steering.steering.time.perf_counter", lambda: now_s)
    off = Controller(PolicyConfig(mode="off"), flat_profile(target_s=0.010))
    steering = Steering(off, Metrics(3), windows=(0,), max_draft_batch=64, agreement=Agreement(None), trace=None)
    steering.launch([10] * 4, None, {})
    for _ in range(5):
        for _ in range(20):
            steering.launch([10] * 4, None, {})
            now_s += 0.010
            steering.finished([0] * 4)
        now_s += 30.0
        steering.policy_updated()
    assert steering.snapshot()["plain_step_ratio"] == pytest.approx(1.0)


def test_a_batch_above_max_draft_batch_is_decoded_plainly():
    always = Controller(PolicyConfig(mode="always"))
    steering = Steering(always, Metrics(3), windows=(0,), max_draft_batch=2, agreement=Agreement(None), trace=None)
    steps = [steering.launch([5] * batch, None, {}) for batch in (2, 3)]
    assert [(step.rung.gamma, step.reason) for step in steps] == [(7, "always"), (0, "max-draft-batch")]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"mode": "always", "fixed_gamma": 7}, "prepared no graphs"),
        ({"mode": "off", "margin": -1}, "must not be negative"),
        ({"mode": "off", "mood": "good"}, "unknown setting mood"),
        ({"mode": "off", "simulate_acceptance": 0.5}, "this server samples from the policy"),
    ],
)
def test_a_change_that_is_refused_changes_nothing(steered, settings, words):
    steered.change_self_quant({"mode": "auto"})
    before = steered.self_quant()
    assert before["refused_change"] is None
    assert not steered.set_internal_state({"self_quant": settings})
    after = steered.self_quant()
    assert words in after.pop("refused_change")
    assert {**after, "refused_change": None} == before
    assert words in steered.log_path.read_text(errors="replace")


def test_other_internal_state_is_sglangs(steered):
    before = steered.self_quant()
    assert steered.set_internal_state({"pp_max_micro_batch_size": 8})
    assert not steered.set_internal_state({"unheard_of": 8})
    assert not steered.set_internal_state({"self_quant": {"mode": "off"}, "pp_max_micro_batch_size": 8})
    after = steered.self_quant()
    assert "comes alone" in after["refused_change"]
    assert {**after, "refused_change": before["refused_change"]} == before


def test_the_simulated_acceptance_changes_while_serving(qwen3, folder):
    """On a benchmark's server; and such a server without step times cannot be switched to a mode that needs them."""
    arms = [Arm.parse("self_quant:2"), Arm.parse("self_quant:0"), Arm.parse("self_quant:3")]
    config = {"policy": start_policy(arms)}
    args, env = {"load-format": "dummy"}, {SIMULATE_ACCEPTANCE_ENV: "0.5"}
    with self_quant(qwen3, folder / "simulated.log", config, GAMMA_MAX, args, env) as server:
        for arm, alpha in [(arms[0], 1.0), (arms[0], 0.0), (arms[1], 0.5), (arms[2], 0.5)]:
            server.change_self_quant(arm.settings(alpha))
            before = server.self_quant()
            load(server)
            after = server.self_quant()
            drafted, accepted = (after[name] - before[name] for name in ("drafted_tokens", "accepted_tokens"))
            assert decisions(server, before).keys() == {f"gamma={arm.gamma}:{arm.policy['mode']}"}
            expected = arm.expected_accept_length(alpha) - 1
            assert (
                not drafted if arm.gamma == 0 else accepted / (drafted / arm.gamma) == pytest.approx(expected, abs=0.15)
            )
        assert set(after["simulated_acceptance"].values()) == {0.5}
        with pytest.raises(RuntimeError, match="has none for gamma"):
            server.change_self_quant({"mode": "auto", "ladder": [2, 3]})
        with pytest.raises(RuntimeError, match="number from 0 to 1"):
            server.change_self_quant({"simulate_acceptance": 2.0})
        assert server.self_quant()["policy"] == after["policy"]


def test_a_profile_from_elsewhere_is_refused(qwen3, folder, calibrated):
    elsewhere = folder / "elsewhere.json"
    crafted(calibrated[0], elsewhere, device="NVIDIA H200")
    server = self_quant(qwen3, folder / "elsewhere.log", {"profile": str(elsewhere), "policy": AUTO}, GAMMA_MAX)
    with pytest.raises(RuntimeError, match="device: profile 'NVIDIA H200', here"):
        with server:
            pass


def test_two_ranks_decide_alike(qwen3, folder, calibrated):
    """Both take rank 0's table; a disagreement would stop the server at a check, a differing gamma hang it."""
    profile = folder / "two-ranks.json"
    crafted(calibrated[0], profile, tp_size=2)
    with self_quant(
        qwen3, folder / "two-ranks.log", {"profile": str(profile), "policy": AUTO}, GAMMA_MAX, {"tp-size": 2}, TWO_RANKS
    ) as server:
        load(server)
        load(server)
        state = server.self_quant()
        # Both must change at the same step.
        load_and_change(server, [{"mode": "always", "fixed_gamma": 1}, {"mode": "off"}, {"mode": "auto"}] * 4)
        assert server.self_quant()["settings_version"] == 12
    assert state["switches"] >= 3
    assert sum(state["decisions"].values()) > 2 * CHECK_EVERY_STEPS
