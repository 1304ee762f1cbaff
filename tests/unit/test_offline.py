"""Acceptance without a server: the chain against a decode loop, the estimate against drawn cycles."""

import json
import random

import pytest
import torch
from transformers import DynamicCache

from er_sglang.bench import toy
from er_sglang.cli import main
from er_sglang.config import HEADS, SINK_TOKENS
from er_sglang.cycle.step import Step
from er_sglang.cycle.window import AttentionWindow, with_window_rows
from er_sglang.drafting.rescoring import rescore_
from er_sglang.offline import estimate
from er_sglang.offline.chain import BLOCK, visible, visible_positions
from er_sglang.offline.drafters import Drafter, Outcome, Policy, Weights, compare, distribution
from er_sglang.sampling import SamplingParams

GAMMA = 3
INT4 = Weights(format="int4", group_size=128)


@pytest.fixture(scope="module")
def policy():
    model = toy.make_model("qwen2", toy.PolicyShape(hidden=128, intermediate=256, layers=2), seed=3).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5 * weight.shape[-1] ** -0.5)
    return Policy(model, torch.float32)


@pytest.mark.parametrize("window", [0, 40, 300])
def test_every_chain_is_that_of_a_decode_loop_on_the_policys_cache(policy, window):
    first, length = 70, 70 + BLOCK + 30
    text = torch.randint(2, 128, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    copy, head = policy.quantize(INT4), policy.quantize_head(128)
    drafters = [Drafter(weights=INT4, attention_window=window, head=name) for name in HEADS]
    found = policy.outcomes(text, first, 0.7, GAMMA, copy, head, drafters)
    for start in (first, first + 1, first + 60, first + BLOCK + 5, length - 1 - GAMMA):
        rows = looped(policy, copy, head, text, start, window)
        for drafter, (accepted, ratios) in zip(drafters, rows):
            outcome = found[drafter]
            for depth in range(GAMMA):
                column = start + depth - first
                assert outcome.expected[depth, column].item() == pytest.approx(accepted[depth], abs=1e-5)
                assert outcome.ratio[depth, column].item() == pytest.approx(ratios[depth], abs=1e-4)


@torch.inference_mode()
def looped(policy, copy, head, text, start, window):
    """The same by decode steps: the quantized model on the policy's cache, cut to what the window keeps."""
    model = policy.model
    cache = model(torch.tensor([text[:start]]), use_cache=True).past_key_values
    seen = [j for j in range(start) if not window or j < SINK_TOKENS or j >= start - window]
    cut = DynamicCache()
    for index, layer in enumerate(cache.layers):
        cut.update(layer.keys[:, :, seen], layer.values[:, :, seen], index)
    p = distribution(model(torch.tensor([text])).logits[0], 0.7)
    rows = [([], []) for _ in HEADS]
    for depth in range(GAMMA):
        t = start + depth
        hidden = torch.func.functional_call(
            policy.backbone,
            copy.weights,
            (torch.tensor([[text[t]]]),),
            {"past_key_values": cut, "position_ids": torch.tensor([[t]]), "use_cache": True},
        ).last_hidden_state[0]
        by_policy, by_copy = hidden @ policy.head.weight.T, hidden @ head.weights["weight"].T
        rescored = by_copy.clone()
        rescore_(rescored, hidden, policy.head.weight)
        for (accepted, ratios), logits in zip(rows, (by_copy, rescored, by_policy)):
            q = distribution(logits, 0.7)
            expected, ratio = compare(p[t : t + 1], q, torch.tensor([text[t + 1]]))
            accepted.append(expected.item())
            ratios.append(ratio.item())
    return rows


@pytest.mark.parametrize("window", [1, 7, 100])
def test_the_window_is_the_servers(window):
    gamma, context = 2, 300
    table = with_window_rows(torch.arange(context)[None].int(), 1)
    rows = AttentionWindow(window, gamma, table, first_row=1, page_size=1)
    nothing = torch.zeros(1)
    params = SamplingParams(*[nothing] * 5)
    for start in (1, SINK_TOKENS, SINK_TOKENS + window, SINK_TOKENS + window + 1, context - gamma):
        step = Step(torch.tensor([0]), torch.tensor([start]), torch.tensor([start]), nothing, nothing, params)
        of_server = table[1, : start - int(rows.load(step))].tolist()
        positions = visible_positions(start, start, window, torch.device("cpu"))
        assert positions[visible(positions, start, window)].tolist() == of_server


def test_positions_of_a_block_hold_those_of_each_chain():
    for window in (0, 10, 100):
        union = set(visible_positions(150, 180, window, torch.device("cpu")).tolist())
        each = [visible(torch.arange(400), start, window).nonzero()[:, 0].tolist() for start in (150, 165, 180)]
        assert union >= set().union(*each)


def test_acceptance_is_one_minus_the_distance_of_total_variation():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    for token, ratio in ((0, 0.4), (1, 1.0), (2, 1.0)):
        expected, found = compare(p, q, torch.tensor([token]))
        assert expected.item() == pytest.approx(0.7)
        assert found.item() == pytest.approx(ratio)


def test_greedy_accepts_equal_argmax():
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]])
    p, q = distribution(logits, 0), distribution(logits[:1].expand(2, 3), 0)
    expected, ratio = compare(p, q, logits.argmax(-1))
    assert expected.tolist() == ratio.tolist() == [1.0, 0.0]


def test_estimate_is_what_drawn_cycles_count():
    """A policy that stays for long in either pair of four tokens, and a drafter that is right in one pair only, and
    worse with depth: cycles drawn by the rule itself, against the estimate from texts of the policy alone."""
    stay = [[0.6, 0.36, 0.02, 0.02], [0.3, 0.66, 0.02, 0.02], [0.02, 0.02, 0.86, 0.1], [0.02, 0.02, 0.76, 0.2]]
    p = torch.tensor(stay, dtype=torch.float64)
    q = torch.stack([torch.cat([p[:2], p[2:].flip(1) * (1 - w) + p[2:] * w]) for w in (0.5, 0.4, 0.3)])
    rng = random.Random(1)

    def draw(weights) -> int:
        return rng.choices(range(4), weights.tolist())[0]

    text = [0]
    for _ in range(40_000):
        text.append(draw(p[text[-1]]))
    before, after = torch.tensor(text[:-1]), torch.tensor(text[1:])
    expected = torch.minimum(p[before], q[:, before]).sum(-1)
    ratio = (q[:, before, after] / p[before, after]).clamp(max=1)
    kept = estimate.tally(Outcome(expected, ratio), 0, [0, 10**9])[0]

    counts = torch.zeros(GAMMA + 1, dtype=torch.float64)
    last = 0
    for _ in range(20_000):
        counts[0] += 1
        for depth in range(GAMMA):
            draft = draw(q[depth, last])
            if rng.random() * q[depth, last, draft] >= p[last, draft]:
                last = draw((p[last] - q[depth, last]).clamp(min=0))
                break
            counts[depth + 1] += 1
            last = draft
        else:
            last = draw(p[last])
    drawn, estimated = estimate.alphas(counts), estimate.alphas(kept)
    assert torch.allclose(drawn, estimated, atol=0.02), (drawn, estimated)
    assert (drawn - expected.mean(1)).abs().max() > 0.06, "contexts that are all alike would give the same"


def test_tallies_fall_into_contexts():
    outcome = Outcome(torch.full((2, 20), 0.5).double(), torch.full((2, 20), 0.5).double())
    whole = estimate.tally(outcome, 100, [0, 1000])
    parts = estimate.tally(outcome, 100, [0, 100, 110, 1000])
    assert parts[0].sum() == 0 and torch.allclose(parts.sum(0), whole[0])
    assert estimate.alphas(whole[0]).tolist() == pytest.approx([0.5, 0.5])
    assert estimate.tally(Outcome(outcome.expected[:, :1], outcome.ratio[:, :1]), 0, [0, 9]).tolist() == [[0, 0, 0]]


def test_intervals_are_over_prompts():
    kept = torch.tensor([[10.0, 9.0], [10.0, 5.0]]).double()
    low, high = estimate.interval(estimate.alphas(estimate.resampled(kept))[:, 0])
    assert (low, high) == pytest.approx((0.5, 0.9))


def test_the_command(tmp_path, capsys):
    policy = toy.make_random_policy(tmp_path / "policy")
    asked = ["--limit", "2", "--weights", "int4,fp8", "--heads", "int4", "--windows", "0,1", "--dtype", "float32"]
    command = ["acceptance", str(policy), *asked, "--ignore-eos", "--out", str(tmp_path / "out")]
    assert main([*command, "--new-tokens", "9"]) == 0
    rows = json.loads((tmp_path / "out/acceptance.json").read_text())["rows"]
    assert [(row["weights"], row["attention_window"]) for row in rows] == [("int4", 0), ("fp8", 0), ("int4", 1)]
    for row in rows:
        low, high = row["accept_length_interval"]
        assert len(row["alphas"]) == 3 and 1.0 < low <= row["accept_length"] <= high <= 4.0
    assert rows[1]["accept_length"] > rows[0]["accept_length"], "of twice the bits"
    assert (tmp_path / "out/table.md").read_text().count("int4 g128") == 2 and (
        tmp_path / "out/plot.png"
    ).stat().st_size
    capsys.readouterr()
    assert main([*command, "--new-tokens", "3"]) == 1
    assert "no response is longer than --gamma, 3 tokens" in capsys.readouterr().err
