"""Acceptance without a server: the chain against a decode loop, the estimate against drawn cycles."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from er_sglang.bench import toy
from er_sglang.cli import main
from er_sglang.config import FIRST_TOKENS, HEADS, LAST_TOKENS, SINK_TOKENS
from er_sglang.cycle.step import Step
from er_sglang.cycle.window import AttentionWindow, with_window_rows
from er_sglang.drafting.rescoring import rescore_
from er_sglang.offline import estimate
from er_sglang.offline.chain import BLOCK, LAG, Chosen, Recent
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


@pytest.mark.parametrize(
    ("rule", "window"), [("recency", 0), ("recency", 40), ("recency", 300), ("attention", 40), ("attention", 200)]
)
def test_every_chain_is_that_of_a_decode_loop_on_the_policys_cache(policy, rule, window):
    first, length = 70, 70 + BLOCK + 30
    text = torch.randint(2, 128, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    copy, head = policy.quantize(INT4), policy.quantize_head(128)
    drafters = [Drafter(weights=INT4, attention_window=window, window_by=rule, head=name) for name in HEADS]
    found = policy.outcomes(text, first, 0.7, GAMMA, copy, head, drafters)
    for start in (first, first + 1, first + 60, first + BLOCK + 5, length - 1 - GAMMA):
        if rule == "recency":
            seen = [j for j in range(start) if not window or j < SINK_TOKENS or j >= start - window]
        else:
            seen = chosen(policy, copy, text, first, start, window)
        rows = looped(policy, copy, head, text, start, seen)
        for drafter, (accepted, ratios) in zip(drafters, rows):
            outcome = found[drafter]
            for depth in range(GAMMA):
                column = start + depth - first
                assert outcome.expected[depth, column].item() == pytest.approx(accepted[depth], abs=1e-5)
                assert outcome.ratio[depth, column].item() == pytest.approx(ratios[depth], abs=1e-4)


@torch.inference_mode()
def chosen(policy, copy, text, first, start, window):
    """What the draft LAG tokens earlier attends to most in layer 1 of 2, of what is older than the last tokens; and these, and
    the first ones. Where that draft is of the prompt or has no choice, more of the last ones."""
    before = start - LAG
    until = start - LAST_TOKENS
    if before < first or until < FIRST_TOKENS + window:
        return sorted({*range(FIRST_TOKENS), *range(max(start - LAST_TOKENS - window, FIRST_TOKENS), start)})
    cache = policy.model(torch.tensor([text[:before]]), use_cache=True).past_key_values
    keys_GSD, queries, attention = cache.layers[1].keys[0].clone(), [], policy.model.model.layers[1].self_attn
    hook = attention.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
    position = torch.tensor([[before]])
    torch.func.functional_call(
        policy.backbone,
        copy.weights,
        (torch.tensor([[text[before]]]),),
        {"past_key_values": cache, "position_ids": position},
    )
    hook.remove()
    cos, sin = policy.model.model.rotary_emb(keys_GSD, position)
    query, _ = apply_rotary_pos_emb(
        queries[0].view(1, 1, -1, attention.head_dim).transpose(1, 2), keys_GSD[None], cos, sin
    )
    keys_HSD = keys_GSD.repeat_interleave(query.shape[1] // len(keys_GSD), 0)
    weights_S = (attention.scaling * (keys_HSD @ query[0].mT)[..., 0]).softmax(-1).mean(0)
    best = weights_S[FIRST_TOKENS:until].topk(window).indices + FIRST_TOKENS
    return [*range(FIRST_TOKENS), *sorted(best.tolist()), *range(until, start)]


@torch.inference_mode()
def looped(policy, copy, head, text, start, seen):
    """The same by decode steps: the quantized model on the policy's cache, cut to what the window keeps."""
    model = policy.model
    cache = model(torch.tensor([text[:start]]), use_cache=True).past_key_values
    cut = DynamicCache()
    for index, layer in enumerate(cache.layers):
        cut.update(layer.keys[:, :, seen], layer.values[:, :, seen], index)
    p = distribution(model(torch.tensor([text])).logits[0], 0.7)
    rows = [([], []) for _ in HEADS]
    joints = [torch.ones(1)] * len(HEADS)
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
        for i, ((accepted, ratios), logits) in enumerate(zip(rows, (by_copy, rescored, by_policy))):
            q = distribution(logits, 0.7)
            expected, ratio, joints[i] = compare(p[t : t + 1], q, torch.tensor([text[t + 1]]), joints[i])
            accepted.append(expected.item())
            ratios.append(ratio.item())
    return rows


@pytest.mark.parametrize("window", [1, 7, 100])
def test_the_window_is_the_servers(window):
    gamma, context = 2, 300
    table = with_window_rows(torch.arange(context)[None].int(), 1)
    rows = AttentionWindow(window, gamma, table, 1, 1, None)
    nothing = torch.zeros(1)
    params = SamplingParams(*[nothing] * 5)
    for start in (1, SINK_TOKENS, SINK_TOKENS + window, SINK_TOKENS + window + 1, context - gamma):
        step = Step(torch.tensor([0]), torch.tensor([start]), torch.tensor([start]), nothing, nothing, nothing, params)
        of_server = table[1, : start - int(rows.load(step))].tolist()
        positions = Recent(window).positions(start, start, torch.device("cpu"))
        assert positions[Recent(window).mask(positions, torch.tensor([start]))[0]].tolist() == of_server


def test_the_choice_is_the_servers():
    size, first, count = 8, 100, 60
    scores_TS = torch.rand(count, first + count, generator=torch.Generator().manual_seed(0))
    reads = Chosen(size, scores_TS, first)
    table = with_window_rows(torch.arange(first + count + GAMMA)[None].int(), 1)
    nothing = torch.zeros(1)
    for start in range(first + LAG, first + count):
        until = start - LAST_TOKENS
        best = scores_TS[start - LAG - first, FIRST_TOKENS:until].argsort(descending=True) + FIRST_TOKENS
        attended = SimpleNamespace(first=FIRST_TOKENS, until=torch.tensor([until]), tokens=best[None, :size])
        rows = AttentionWindow(size, GAMMA, table, 1, 1, attended)
        step = Step(
            torch.tensor([0]),
            torch.tensor([start]),
            torch.tensor([start]),
            nothing,
            nothing,
            nothing,
            SamplingParams(*[nothing] * 5),
        )
        of_server = table[1, : start - int(rows.load(step))].tolist()
        assert reads.mask(torch.arange(first + count), torch.tensor([start]))[0].nonzero()[:, 0].tolist() == sorted(
            of_server
        )


def test_positions_of_a_block_hold_those_of_each_chain():
    for window in (0, 10, 100):
        union = set(Recent(window).positions(150, 180, torch.device("cpu")).tolist())
        starts = torch.tensor([150, 165, 180])
        each = [seen.nonzero()[:, 0].tolist() for seen in Recent(window).mask(torch.arange(400), starts)]
        assert union >= set().union(*each)


def test_acceptance_is_one_minus_the_distance_of_total_variation():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    for token, ratio, after in ((0, 0.4, 1.0), (1, 1.0, 1.0), (2, 1.0, 0.4)):
        expected, found, joint = compare(p, q, torch.tensor([token]), torch.ones(1))
        assert expected.item() == pytest.approx(0.7)
        assert (found.item(), joint.item()) == pytest.approx((ratio, after))


def test_a_later_draft_makes_up_for_what_earlier_ones_lacked():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
    for token, ratio, after in ((0, 0.8, 1.0), (1, 1.0, 0.5), (2, 1.0, 0.2)):
        expected, found, joint = compare(p, q, torch.tensor([token]), torch.tensor([0.5]))
        assert expected.item() == pytest.approx((0.2 + 0.15 + 0.1) / 0.5)
        assert (found.item(), joint.item()) == pytest.approx((ratio, after))


def test_greedy_accepts_equal_argmax():
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 2.0]])
    p, q = distribution(logits, 0), distribution(logits[:1].expand(2, 3), 0)
    expected, ratio, _ = compare(p, q, logits.argmax(-1), torch.ones(2))
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
    joint, rows = torch.ones(len(before), dtype=torch.float64), []
    for depth in range(GAMMA):
        *row, joint = compare(p[before], q[depth, before], after, joint.roll(1) if depth else joint)
        rows.append(row)
    expected, ratio = (torch.stack(each) for each in zip(*rows))
    kept = estimate.tally(Outcome(expected, ratio), 0, [0, 10**9])[0]

    counts = torch.zeros(GAMMA + 1, dtype=torch.float64)
    last = 0
    for _ in range(20_000):
        drafts, joint, accepted, weights = [last], 1.0, 0, (p[last] - q[0, last]).clamp(min=0)
        for depth in range(GAMMA):
            token = draw(q[depth, drafts[-1]])
            joint = min(1.0, joint * (p[drafts[-1], token] / q[depth, drafts[-1], token]).item())
            drafts.append(token)
            rest = (joint * p[token] - q[depth + 1, token]).clamp(min=0) if depth + 1 < GAMMA else joint * p[token]
            left = rest.sum().item()
            stops = joint if depth + 1 == GAMMA or joint == 1.0 else left / (left + 1 - joint)
            if rng.random() < stops:
                accepted, weights = depth + 1, rest
        counts[: accepted + 1] += 1
        last = draw(weights)
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
    asked = ["--limit", "2", "--weights", "int4,fp8", "--heads", "int4", "--windows", "0,1", "--window-by"]
    asked += ["recency,attention", "--dtype", "float32"]
    command = ["acceptance", str(policy), *asked, "--ignore-eos", "--out", str(tmp_path / "out")]
    assert main([*command, "--new-tokens", "9"]) == 0
    rows = json.loads((tmp_path / "out/acceptance.json").read_text())["rows"]
    assert [(row["weights"], row["attention_window"]) for row in rows] == [
        ("int4", 0),
        ("fp8", 0),
        ("int4", 1),
        ("int4", 1),
    ]
    assert [row["window_by"] for row in rows] == [*["recency"] * 3, "attention"]
    for row in rows:
        low, high = row["accept_length_interval"]
        assert len(row["alphas"]) == 3 and 1.0 < low <= row["accept_length"] <= high <= 4.0
    assert rows[1]["accept_length"] > rows[0]["accept_length"], "of twice the bits"
    table = (tmp_path / "out/table.md").read_text()
    assert table.count("int4 g128") == 3 and table.count("by attention") == 1
    assert (tmp_path / "out/plot.png").stat().st_size
    capsys.readouterr()
    assert main([*command, "--new-tokens", "3"]) == 1
    assert "no response is longer than --gamma, 3 tokens" in capsys.readouterr().err
