"""The simulator: closed forms, request patterns, the paper's ablation, and the property that auto does not lose."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from er_sglang.cli import main
from er_sglang.errors import ConfigError
from er_sglang.policy.acceptance import emitted
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller
from er_sglang.policy.profile import Profile, Sample
from er_sglang.tools.simulator import simulate
from er_sglang.tools.workload import Request, draw_lengths, make_requests
from tests.profiles import LADDER, flat_profile, make_profile

PROPERTY_CASES = int(os.environ.get("ER_SGLANG_PROPERTY_CASES", "2000"))


def a100_14b_profile(gammas=(1, 2, 3, 5, 7, 9, 11)) -> Profile:
    """A100-80GB, Qwen2.5-14B in bf16 with an int4 drafter, tensor parallelism 1.

    The roofline constants that the authors of arXiv 2606.18967 fitted to their own sweep and published beside their
    code: bandwidth 1.564 TB/s, 233.5 TFLOP/s, weights 29.54 GB (drafter 9.72 GB, times 1.271 for its kernel), 48,070
    bytes of KV cache per token, 27.98 GFLOP per token and 0.98 MFLOP per token of context, and 50, 153.9 and 232.3 us
    per request of a target, draft and verify step.
    """
    bandwidth, flops, kv_bytes = 1.564e12, 233.5e12, 48_070

    def read_s(weight_bytes: float, b: int, c: int) -> float:
        return (weight_bytes + kv_bytes * b * c) / bandwidth

    def compute_s(b: int, c: int) -> float:
        return b * (27.98e9 + 0.98e6 * c) / flops

    return make_profile(
        lambda b, c: max(read_s(29.54e9, b, c), compute_s(b, c)) + 50e-6 * b,
        lambda b, c: max(read_s(1.271 * 9.72e9, b, c), compute_s(b, c)) + 153.9e-6 * b,
        lambda b, c, g: max(read_s(29.54e9, b, c), (g + 1) * compute_s(b, c)) + 232.3e-6 * b,
        gammas,
        batches=(1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128),
        contexts=(256, 1024, 4096, 8192),
    )


def run(config: PolicyConfig, profile: Profile, requests, **kwargs):
    return simulate(profile, requests, Controller(config, profile), **kwargs)


def test_plain_decoding_takes_a_step_per_token():
    requests = make_requests([10, 30, 20], [0.9])
    rollout = run(PolicyConfig(mode="off"), flat_profile(target_s=0.5), requests)
    assert rollout.time_s == pytest.approx(15.0) and rollout.tokens == 60
    assert [batch for _, batch, _ in rollout.timeline] == [3] * 10 + [2] * 10 + [1] * 10


@pytest.mark.parametrize(("alpha", "cycles"), [(1.0, 20), (0.0, 80)])
def test_always_at_the_two_ends_of_acceptance(alpha, cycles):
    rollout = run(PolicyConfig(mode="always", fixed_gamma=3), flat_profile(), make_requests([80], [alpha]))
    assert rollout.time_s == pytest.approx(cycles * (3 * 0.3 + 1.1)) and rollout.tokens == 80


def test_the_accept_length_is_the_closed_form():
    alphas = (0.9, 0.8, 0.6)
    rollout = run(PolicyConfig(mode="always", fixed_gamma=5), flat_profile(), make_requests([20_000] * 4, alphas))
    assert rollout.summary()["accept_length"] == pytest.approx(emitted([0.9, 0.8, 0.6, 0.6, 0.6])[5], rel=0.02)


def test_a_refilled_pool_stays_full_until_the_queue_is_empty():
    rollout = run(PolicyConfig(mode="off"), flat_profile(), make_requests([10] * 12, [0.9]), max_running=4)
    assert rollout.time_s == pytest.approx(30.0) and {batch for _, batch, _ in rollout.timeline} == {4}


def test_turns_wait_grow_the_context_and_prefill():
    request = Request(prompt_tokens=50, turns=(10, 20), alphas=(0.9,), turn_prompt_tokens=30, turn_wait_s=7.0)
    rollout = run(PolicyConfig(mode="off"), flat_profile(), [request], prefill_tokens_per_s=10.0)
    assert rollout.time_s == pytest.approx(5.0 + 10.0 + 7.0 + 3.0 + 20.0) and rollout.tokens == 30


def test_requests_arrive_when_they_do():
    requests = [
        Request(prompt_tokens=10, turns=(10,), alphas=(0.9,), arrival_s=arrival_s) for arrival_s in (0.0, 4.0, 50.0)
    ]
    rollout = run(PolicyConfig(mode="off"), flat_profile(), requests)
    assert [batch for _, batch, _ in rollout.timeline] == [1] * 4 + [2] * 6 + [1] * 4 + [1] * 10
    assert rollout.time_s == pytest.approx(60.0)


def test_a_batch_that_fills_up_is_not_drafted_for_once_it_is_full():
    """Requests trickle in, 128 in all, run together, and end: drafting pays at either end and nowhere between."""
    profile = a100_14b_profile()
    requests = [
        replace(request, arrival_s=0.05 * index)
        for index, request in enumerate(make_requests(draw_lengths("lognormal:900:0.3:8192", 128, seed=0), [0.8]))
    ]
    auto = run(PolicyConfig(), profile, requests)
    by_phase = {"filling": [], "full": [], "draining": []}
    full_at_s = next(time_s for time_s, batch, _ in auto.timeline if batch > 100)
    for time_s, batch, gamma in auto.timeline:
        phase = "full" if batch > 100 else "filling" if time_s < full_at_s else "draining"
        if phase == "full" or batch < 12:
            by_phase[phase].append(gamma > 0)
    share = {phase: sum(drafts) / len(drafts) for phase, drafts in by_phase.items()}
    assert share["filling"] > 0.9 and share["draining"] > 0.9 and share["full"] < 0.05, share
    for config in (PolicyConfig(mode="off"), PolicyConfig(mode="always", fixed_gamma=3)):
        assert auto.time_s < 0.98 * run(config, profile, requests).time_s


def test_longer_contexts_take_longer_steps():
    profile = make_profile(lambda b, c: c / 100, lambda b, c: 1.0, lambda b, c, g: c / 100, (1,), (1, 2), (100, 200))
    short, long = (Request(prompt_tokens=n, turns=(n // 10,), alphas=(0.9,)) for n in (100, 200))
    rollout = run(PolicyConfig(mode="off"), profile, [short, long])
    both, alone = sum((150 + i) / 100 for i in range(10)), sum((200 + i) / 100 for i in range(10, 20))
    assert rollout.time_s == pytest.approx(both + alone)


def test_tail_requests_accept_least():
    short, long = make_requests([100, 1000], [0.9, 0.8], tail_alpha=0.6)
    assert long.alphas == pytest.approx((0.6, 0.6 / 0.9 * 0.8)) and short.alphas[0] == pytest.approx(0.87)


def test_length_distributions(tmp_path):
    assert draw_lengths("fixed:7", 3, seed=0) == [7, 7, 7]
    assert all(5 <= length <= 9 for length in draw_lengths("uniform:5:9", 100, seed=0))
    lengths = sorted(draw_lengths("lognormal:1000:0.8:4000", 2001, seed=0))
    assert lengths[1000] == pytest.approx(1000, rel=0.1) and lengths[-1] == 4000
    (tmp_path / "trace").write_text("3\n4\n")
    assert draw_lengths(str(tmp_path / "trace"), 3, seed=0) == [3, 4, 3]
    (tmp_path / "empty").touch()
    for text in ("uniform:5", "uniform:9:5", "fixed:many", str(tmp_path / "empty"), __file__):
        with pytest.raises(ConfigError, match="uniform:LOW:HIGH"):
            draw_lengths(text, 3, seed=0)


def test_the_papers_ablation():
    """14B on A100s, 128 requests per GPU, high acceptance: off, always, toggle, toggle and ladder, auto.

    Published: always 6.7 % slower than off, the full method 16.8 % faster. The lengths are ours, chosen for the first
    figure.
    """
    profile = a100_14b_profile()
    arms = {
        "off": PolicyConfig(mode="off"),
        "always": PolicyConfig(mode="always", fixed_gamma=5),
        "toggle": PolicyConfig(mode="paper", paper_ladder=(5,)),
        "ladder": PolicyConfig(mode="paper"),
        "auto": PolicyConfig(ladder=(1, 2, 3, 5, 7, 9, 11)),
    }
    time_s = {}
    for arm, config in arms.items():
        controller = Controller(config, profile)
        time_s[arm] = 0.0
        for index in range(6):
            requests = make_requests(
                draw_lengths("lognormal:700:0.45:8192", 128, seed=index), [0.985], prompt_tokens=200
            )
            time_s[arm] += simulate(profile, requests, controller, seed=index).time_s
            controller.policy_updated()
    relative = {arm: seconds / time_s["off"] for arm, seconds in time_s.items()}
    assert relative["auto"] < relative["ladder"] < relative["toggle"] < 0.85 < 1.0 < relative["always"], relative
    assert relative["always"] == pytest.approx(1.067, abs=0.02)


def test_hard_survivors_switch_drafting_off_again():
    """The tail accepts so little that drafting stops paying, where a one-way toggle would go on."""
    profile = a100_14b_profile()
    requests = make_requests([*range(100, 600, 10), *[3000] * 4], [0.95], tail_alpha=0.3)
    auto = run(PolicyConfig(), profile, requests)
    toggle = run(PolicyConfig(mode="paper", paper_ladder=(5,)), profile, requests)
    middle = [gamma for _, batch, gamma in auto.timeline if 6 <= batch <= 16]
    tail = [gamma for _, batch, gamma in auto.timeline if batch <= 4]
    assert middle.count(0) / len(middle) < 0.2 and tail.count(0) / len(tail) > 0.8
    assert auto.time_s < 0.8 * toggle.time_s


def random_profile(rng: random.Random) -> Profile:
    """Rooflines with fixed costs and 3 % of noise: from drafting that never pays to drafting that always does."""
    draft, compute, kv, fixed = (
        rng.uniform(0.2, 1.0),
        rng.uniform(0.002, 0.15),
        rng.uniform(0, 2e-5),
        rng.uniform(0, 0.3),
    )
    draft_fixed = fixed * rng.uniform(0.2, 1.0)
    rows = []
    for b in (1, 4, 16):
        for c in (128, 2048):

            def noisy(seconds: float) -> float:
                return seconds * rng.uniform(0.97, 1.03)

            rows.append(Sample("draft", 0, b, c, noisy(max(draft + kv * b * c, compute * b) + draft_fixed)))
            for g in (0, *LADDER):
                phase = "verify" if g else "target"
                rows.append(Sample(phase, g, b, c, noisy(max(1.0 + kv * b * c, compute * b * (g + 1)) + fixed)))
    return Profile.from_samples(rows)


def random_requests(rng: random.Random) -> tuple[list[Request], int]:
    """Synchronous, trickling in, refilled or multi-turn; even or long-tailed; acceptance that falls with depth and
    length, or not."""
    count, longest, skew = rng.choice((1, 2, 4, 8, 12)), rng.randint(150, 400), rng.choice((0.3, 1.0, 3.0))
    lengths = [longest, *(max(20, int(longest * rng.random() ** skew)) for _ in range(count - 1))]
    alpha, fall = rng.uniform(0.1, 0.99), rng.choice((0.0, 0.0, 0.1))
    pattern = rng.choice(("batch", "trickle", "pool", "turns"))
    requests = make_requests(
        lengths,
        [max(0.02, alpha - fall * i) for i in range(max(LADDER))],
        tail_alpha=rng.choice((None, alpha * rng.uniform(0.4, 1.0))),
        prompt_tokens=rng.randint(50, 800),
        turns=rng.randint(2, 4) if pattern == "turns" else 1,
        turn_prompt_tokens=rng.randint(0, 100),
        turn_wait_s=rng.uniform(0.0, 40.0),
    )
    if pattern == "trickle":
        requests = [replace(request, arrival_s=rng.uniform(0.0, 200.0)) for request in requests]
    return requests, max(1, count // 2) if pattern == "pool" else count


def test_auto_never_loses_to_off_or_always():
    """On a server that has seen such requests before: 0.98 of the better of the two, but for what estimating costs.

    These rollouts are a few hundred steps, some of a single request: shorter than it takes to tell two acceptances 3 %
    apart. So a loss of 15 steps is allowed however short the rollout, and the whole of the cases is held to more: 95 %
    of them within 0.98 with no allowance, and a gain on average.
    """
    gains = []
    for seed in range(PROPERTY_CASES):
        rng = random.Random(seed)
        profile = random_profile(rng)
        (requests, max_running), gamma = random_requests(rng), rng.choice(LADDER)
        auto = Controller(PolicyConfig(), profile)
        simulate(profile, requests, auto, max_running=max_running, seed=-seed - 1)
        auto.idle()
        auto_s, off_s, always_s = (
            simulate(profile, requests, controller, max_running=max_running, seed=seed).time_s
            for controller in (
                auto,
                Controller(PolicyConfig(mode="off"), profile),
                Controller(PolicyConfig(mode="always", fixed_gamma=gamma), profile),
            )
        )
        best_s = min(off_s, always_s)
        assert auto_s <= best_s / 0.98 + 15 * profile.target_s(1, 500), (seed, auto_s / best_s)
        gains.append(best_s / auto_s)
    assert sum(gains) / len(gains) > 1.0 and sorted(gains)[len(gains) // 20] > 0.98


def test_command_line(tmp_path, capsys):
    a100_14b_profile().save(tmp_path / "profile.json")
    arguments = [
        "simulate",
        "--profile",
        str(tmp_path / "profile.json"),
        "--requests",
        "16",
        "--lengths",
        "uniform:50:200",
    ]
    assert main([*arguments, "--modes", "off,always,threshold,paper,auto", "--json", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["off", "always", "threshold", "paper", "auto"]
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["auto"]["time_s"] < results["off"]["time_s"]


@pytest.mark.parametrize("flag", ["--requests", "--max-running", "--turns", "--rollouts"])
def test_the_command_line_counts_from_one(flag, tmp_path, capsys):
    flat_profile().save(tmp_path / "profile.json")
    with pytest.raises(SystemExit):
        main(["simulate", "--profile", str(tmp_path / "profile.json"), flag, "0"])
    assert f"argument {flag}: 0 is less than 1" in capsys.readouterr().err


def figures(profile: Profile, tmp_path: Path, *words: str) -> dict:
    """What `er-sglang simulate` writes; two requests of a hundred tokens."""
    profile.save(tmp_path / "profile.json")
    files = ["--profile", str(tmp_path / "profile.json"), "--json", str(tmp_path / "out.json")]
    assert main(["simulate", *files, "--requests", "2", "--lengths", "fixed:100", *words]) == 0
    return json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize(("gammas", "expected"), [((1, 2), 2), ((1, 2, 3), 3), ((1, 2, 3, 5, 7), 7)])
def test_the_command_line_takes_the_servers_defaults(gammas, expected, tmp_path):
    results = figures(flat_profile(gammas=gammas), tmp_path, "--modes", "always,threshold")
    for mode in ("always", "threshold"):
        assert {*results[mode]["rollouts"][0]["steps_by_gamma"]} == {str(expected)}
    crowd = figures(
        flat_profile(), tmp_path, "--modes", "threshold", "--requests", str(PolicyConfig().threshold_batch + 1)
    )
    assert {*crowd["threshold"]["rollouts"][0]["steps_by_gamma"]} == {"0"}


def test_the_command_line_lets_requests_arrive_over_time(tmp_path):
    results = figures(flat_profile(), tmp_path, "--modes", "off", "--arrival-s", "80", "--rollouts", "1")
    assert results["off"]["time_s"] == pytest.approx(40.0 + 100.0)


def test_the_command_line_states_what_a_window_accepts(tmp_path):
    """A draft takes 1 ms per token that it attends to: of 1000 and more, the first 64 and the last 136."""
    profile = make_profile(
        lambda b, c: 1.0, lambda b, c: 1e-3 * c, lambda b, c, g: 1.0, (3,), batches=(1, 8), contexts=(100, 1000, 2000)
    )
    words = "--modes auto --alpha 1 --prompt-tokens 1000 --rollouts 1 --lengths fixed:400 --windows".split()
    every_s, none_s = (figures(profile, tmp_path, *words, f"136:{x}")["auto"]["time_s"] for x in ("1", "0"))
    assert every_s == pytest.approx(400 / 4 * (3 * 0.2 + 1.0))
    assert 400 * 0.98 < none_s < 400 * 1.02  # full attention loses, and so does this window


def test_the_command_line_takes_measured_acceptance(tmp_path, capsys):
    """Of three drafters the profile has times of two; int4's windows are a server's, and what it measured decides."""

    def row(weights, window, alpha, temperature=1.0, context=None, **more):
        drafter = {"weights": weights, "head": "int4", "group_size": 128, "attention_window": window}
        return {**drafter, "temperature": temperature, "context_tokens": context, "alphas": [alpha, alpha], **more}

    rows = [row("int4", 0, 0.9), row("int4", 256, 0.45), row("int4", 128, 0.9), row("fp8", 0, 0.99)]
    rows += [row("int4", 256, 0.9, window_by="attention")]
    rows += [row("int4", 0, 0.1, temperature=0.5), row("int4", 0, 0.1, context=[0, 256])]
    (tmp_path / "acceptance.json").write_text(json.dumps({"rows": rows}))
    profile = replace(flat_profile(draft_s=0.2), fingerprint={"drafter": ["int4", "int4", 128, "auto"]})
    words = ["--acceptance", str(tmp_path / "acceptance.json"), "--temperature"]
    results = figures(profile, tmp_path, *words, "1.0")
    assert list(results) == ["off", *(f"int4 g128, int4 head, window {window}" for window in (0, "auto"))]
    assert results["off"]["time_s"] > results["int4 g128, int4 head, window 0"]["time_s"]
    by_attention = replace(profile, fingerprint={"drafter": ["int4", "int4", 128, "auto", "attention"]})
    auto = "int4 g128, int4 head, window auto"
    assert figures(by_attention, tmp_path, *words, "1.0")[auto]["time_s"] < results[auto]["time_s"]
    printed = capsys.readouterr().out
    assert "no times of it: {'weights': 'fp8'" in printed and '"attention_window": 0}}' in printed
    figures(profile, tmp_path, *words, "0.5")
    assert "does not pay" in capsys.readouterr().out
    assert main(["simulate", "--profile", str(tmp_path / "profile.json"), *words[:2]]) == 1
    assert "give one of them with --temperature" in capsys.readouterr().err
    (tmp_path / "acceptance.json").write_text(json.dumps({"rows": [row("int4", 256, 0.9)]}))
    assert main(["simulate", "--profile", str(tmp_path / "profile.json"), *words[:2]]) == 1
    assert "no drafter with full attention: measure with --windows 0" in capsys.readouterr().err
