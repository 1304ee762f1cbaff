"""What every sampler must do, on fixed logits: one set of tests for the reference and the fused implementation.

Statistical checks are chi-square tests with a false-alarm rate of 1e-4 each and fixed seeds: what they print is
reproducible. Each is shown to fail for a wrong rule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2

from er_sglang.sampling import Draft, RandomState, Sampler, SamplingParams
from er_sglang.sampling.base import STREAM_ACCEPT
from er_sglang.sampling.reference import distribution, scale, summarize

FALSE_ALARM_RATE = 1e-4
VOCAB = 40
FEW_TOKENS = 4
REAL_VOCAB = 151_936  # Qwen2 and Qwen3
REQUESTS = 20_000
TOP_P_SLACK_TOKENS = 8  # at most 6e-5 of a row's mass

FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    "all in sequence": {"temperature": 1.3, "top_k": 20, "top_p": 0.85, "min_p": 0.02, "sequential": True},
    "all jointly": {"temperature": 1.3, "top_k": 20, "top_p": 0.85, "min_p": 0.02},
}


def make_params(
    rows: int, device, temperature=1.0, top_k=1 << 30, top_p=1.0, min_p=0.0, sequential=False
) -> SamplingParams:
    def fill(value, dtype):
        return torch.full((rows,), value, dtype=dtype, device=device)

    return SamplingParams(
        fill(temperature, torch.float32),
        fill(top_k, torch.int32),
        fill(top_p, torch.float32),
        fill(min_p, torch.float32),
        fill(sequential, torch.bool),
    )


def make_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def exact(logits_V: torch.Tensor, **filters) -> torch.Tensor:
    """The sampling distribution by its definition: sort, filter, normalize; float64."""
    params = {"temperature": 1.0, "top_k": 1 << 30, "top_p": 1.0, "min_p": 0.0, "sequential": False, **filters}
    p_V = (logits_V.double() / params["temperature"]).softmax(0)

    def keep(p_V: torch.Tensor, passes: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        kept = passes(p_V, p_V.unsqueeze(0) > p_V.unsqueeze(1))  # above: [token, other]
        return torch.where(kept, p_V, 0) / p_V[kept].sum()

    def top_k(p_V, above):
        return above.sum(1) < params["top_k"]

    def top_p(p_V, above):
        return (above * p_V).sum(1) <= params["top_p"]

    def min_p(p_V, above):
        return p_V >= params["min_p"] * p_V.max()

    if params["sequential"]:
        for passes in (top_k, top_p, min_p):
            p_V = keep(p_V, passes)
        return p_V
    return keep(p_V, lambda *p: top_k(*p) & top_p(*p) & min_p(*p))


def p_value(tokens: torch.Tensor, p_V: torch.Tensor) -> float:
    """Chi-square test of draws against probabilities; bins expected below 5 are pooled. 0 outside the support."""
    counts = torch.bincount(tokens.cpu(), minlength=len(p_V)).double()
    if counts[p_V == 0].any():
        return 0.0
    expected = p_V * counts.sum()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum().view(1)])
    expected = torch.cat([expected[~small], expected[small].sum().view(1)])
    statistic = ((counts - expected) ** 2 / expected.clamp_min(1e-300))[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    return float(chi2.sf(float(statistic), freedom)) if freedom else 1.0


def run_cycle(sampler: Sampler, device, q_GV, p_NV, filters, seed=1, spoil=lambda draft: draft, rides_B=None):
    """Draft and judge one cycle for REQUESTS equal requests; returns (draft, verdict, params)."""
    gamma = q_GV.shape[0]
    params = make_params(REQUESTS, device, **filters)
    random = RandomState.create(seed, torch.device(device))
    random.advance()
    draft = Draft(
        tokens_NB=torch.zeros((gamma + 1, REQUESTS), dtype=torch.int64, device=device),
        logits_GBV=q_GV.to(device).unsqueeze(1).repeat(1, REQUESTS, 1),
        floor_GB=torch.empty((gamma, REQUESTS), device=device),
        lse_GB=torch.empty((gamma, REQUESTS), device=device),
    )
    for step in range(gamma):
        sampler.draw(
            draft.logits_GBV[step],
            params,
            random,
            step,
            draft.tokens_NB[step + 1],
            draft.floor_GB[step],
            draft.lse_GB[step],
        )
    logits_BNV = p_NV.to(device).unsqueeze(0).repeat(REQUESTS, 1, 1)
    return draft, sampler.judge(logits_BNV, spoil(draft), params, random, rides_B), params


def chain_p_value(sampler, device, filters, spoil=lambda draft: draft) -> float:
    """Smallest p-value over the positions of a chain of 3, Bonferroni-corrected; 0 if a position was never reached."""
    q_GV, p_NV = make_logits(1, 3, VOCAB), make_logits(1, 4, VOCAB) + 0.5 * make_logits(2, 4, VOCAB)
    _, verdict, _ = run_cycle(sampler, device, q_GV, p_NV, filters, spoil=spoil)
    values = []
    for position in range(4):
        reached = verdict.accept_lens_B > position
        if not reached.any():
            return 0.0
        values.append(p_value(verdict.emitted_BN[reached, position], exact(p_NV[position], **filters)))
    return min(1.0, 4 * min(values))


def accepted_paths(p_of: list[torch.Tensor], q_of: list[torch.Tensor]) -> list[torch.Tensor]:
    """By i: probability that the first i drafts are x_1 ... x_i and accepted, float64 [V] * i; distributions of a
    token whatever was before. Sun et al. 2024 (arXiv 2403.10444): q(x_1 ... x_i) * joint_i."""
    drawn = joint = torch.ones((), dtype=torch.float64)
    paths = [joint]
    for p_V, q_V in zip(p_of, q_of):
        joint = (joint[..., None] * p_V / q_V).clamp(max=1)
        drawn = drawn[..., None] * q_V
        paths.append(drawn * joint)
    return paths


def run_few_tokens(sampler, device):
    """A chain of 3 over few tokens, and the distributions p and q that it follows."""
    q_GV, p_NV = make_logits(1, 3, FEW_TOKENS), make_logits(2, 4, FEW_TOKENS)
    p_NV[:3] = q_GV + 0.5 * p_NV[:3]
    _, verdict, _ = run_cycle(sampler, device, q_GV, p_NV, {})
    return verdict, [exact(p_V) for p_V in p_NV], [exact(q_V) for q_V in q_GV]


def independence_p_value(sampler, device) -> float:
    """Of a chain of 3 over few tokens, where each random number weighs; Bonferroni-corrected over its 7 tests.

    The first emitted token follows p; any two, given that the later was reached, are independent: the earlier is of an
    accepted path, and the later follows p. Numbers that drafts, acceptance and residual share break either.
    """
    verdict, p_of, q_of = run_few_tokens(sampler, device)
    paths = accepted_paths(p_of, q_of)
    values = [p_value(verdict.emitted_BN[:, 0], p_of[0])]
    for later in range(1, 4):
        tokens_BN = verdict.emitted_BN[verdict.accept_lens_B > later]
        for earlier in range(later):
            others = [axis for axis in range(later) if axis != earlier]
            accepted_V = paths[later].sum(others) if others else paths[later]
            pairs = torch.outer(accepted_V / accepted_V.sum(), p_of[later]).flatten()
            values.append(p_value(tokens_BN[:, earlier] * FEW_TOKENS + tokens_BN[:, later], pairs))
    return min(1.0, len(values) * min(values))


class SamplerCases:
    """Subclass with fixtures ``sampler`` and ``device``."""

    @pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
    def test_drafts_follow_the_drafters_distribution(self, sampler, device, filters):
        q_GV = make_logits(3, 2, VOCAB)
        draft, _, _ = run_cycle(sampler, device, q_GV, make_logits(4, 3, VOCAB), filters)
        for step in range(2):
            assert p_value(draft.tokens_NB[step + 1], exact(q_GV[step], **filters)) > FALSE_ALARM_RATE / 2

    @pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
    def test_emitted_tokens_follow_the_policys_distribution(self, sampler, device, filters):
        assert chain_p_value(sampler, device, filters) > FALSE_ALARM_RATE

    def test_fails_when_everything_is_accepted(self, sampler, device):
        assert chain_p_value(type(sampler)(simulated_acceptance=1.0), device, {}) < FALSE_ALARM_RATE

    @pytest.mark.parametrize("sequential", [False, True])
    def test_fails_when_filters_apply_in_the_other_order(self, sampler, device, sequential):
        filters = {**FILTERS["all jointly"], "sequential": sequential}
        p_NV = make_logits(2, 2, VOCAB)
        _, verdict, _ = run_cycle(sampler, device, p_NV[:1] + 0.3 * make_logits(1, 1, VOCAB), p_NV, filters)
        other = {**filters, "sequential": not sequential}
        assert p_value(verdict.emitted_BN[:, 0], exact(p_NV[0], **other)) < FALSE_ALARM_RATE
        assert p_value(verdict.emitted_BN[:, 0], exact(p_NV[0], **filters)) > FALSE_ALARM_RATE

    def test_fails_when_the_residual_is_not_subtracted(self, sampler, device):
        # An independent first rejection leaves q out of the residual: accept by the rule, then draw from p.
        class PlainResidual(type(sampler)):
            def judge(self, logits_BNV, draft, params, random, rides_B=None):
                verdict = super().judge(logits_BNV, draft, params, random, rides_B)
                random.advance()
                token, floor, lse = (
                    torch.empty(REQUESTS, dtype=t, device=device) for t in (torch.int64, torch.float32, torch.float32)
                )
                last = (verdict.accept_lens_B - 1).long()
                rows = logits_BNV[torch.arange(REQUESTS, device=device), last]
                self.draw(rows, params, random, 0, token, floor, lse)
                verdict.emitted_BN.scatter_(1, last.view(-1, 1), token.view(-1, 1))
                return verdict

        assert chain_p_value(PlainResidual(), device, {}) < FALSE_ALARM_RATE

    def test_fails_when_q_is_of_another_step(self, sampler, device):
        def spoil(draft):
            return Draft(
                draft.tokens_NB, draft.logits_GBV.roll(1, 0), draft.floor_GB.roll(1, 0), draft.lse_GB.roll(1, 0)
            )

        assert chain_p_value(sampler, device, {}, spoil) < FALSE_ALARM_RATE

    def test_drafts_acceptance_and_residual_draw_independent_numbers(self, sampler, device):
        assert independence_p_value(sampler, device) > FALSE_ALARM_RATE

    @pytest.mark.parametrize(
        ("stream", "shared"),
        [("STREAM_ACCEPT", 0), ("STREAM_ACCEPT", 1), ("STREAM_RESIDUAL", 0), ("STREAM_RESIDUAL", STREAM_ACCEPT)],
    )
    def test_fails_when_streams_are_shared(self, sampler, device, monkeypatch, stream, shared):
        monkeypatch.setattr(sys.modules[type(sampler).__module__], stream, shared)
        assert independence_p_value(sampler, device) < FALSE_ALARM_RATE

    def test_acceptance_is_the_overlap_of_the_distributions(self, sampler, device):
        q_GV = make_logits(1, 1, VOCAB)
        p_NV = make_logits(1, 2, VOCAB) + 0.5 * make_logits(2, 2, VOCAB)
        _, verdict, _ = run_cycle(sampler, device, q_GV, p_NV, {})
        overlap = torch.minimum(exact(q_GV[0]), exact(p_NV[0])).sum().item()
        rate = (verdict.accept_lens_B - 1).double().mean().item()
        assert abs(rate - overlap) < 4 * (overlap * (1 - overlap) / REQUESTS) ** 0.5  # false alarm 6e-5

    def test_drafts_are_accepted_as_often_as_can_be(self, sampler, device):
        """As block verification accepts them: more often, from the second on, than one after the other."""
        verdict, p_of, q_of = run_few_tokens(sampler, device)
        alone = 1.0
        for i, path in enumerate(accepted_paths(p_of, q_of)[1:], start=1):
            alone *= torch.minimum(p_of[i - 1], q_of[i - 1]).sum().item()
            expected = path.sum().item()
            tolerance = 4 * (expected * (1 - expected) / REQUESTS) ** 0.5  # false alarm 6e-5 each
            rate = (verdict.accept_lens_B > i).double().mean().item()
            assert abs(rate - expected) < tolerance
            assert i == 1 or rate - alone > tolerance

    def test_equal_distributions_accept_everything(self, sampler, device):
        logits = make_logits(5, 3, VOCAB)
        _, verdict, _ = run_cycle(sampler, device, logits[:2], logits, {"top_p": 0.9})
        assert (verdict.accept_lens_B == 3).all()

    @pytest.mark.parametrize("filters", [{}, {"top_k": 1}, FILTERS["all"]], ids=["plain", "greedy", "filtered"])
    def test_riders_take_a_plain_step(self, sampler, device, filters):
        """Their token comes from p, and not from max(p - q, 0) after a draft that p would accept."""
        q_GV, p_NV = make_logits(1, 2, VOCAB), make_logits(1, 3, VOCAB) + 0.5 * make_logits(2, 3, VOCAB)
        rides_B = torch.arange(REQUESTS, device=device) % 2 == 0
        _, verdict, _ = run_cycle(sampler, device, q_GV, p_NV, filters, rides_B=rides_B)
        assert (verdict.accept_lens_B[rides_B] == 1).all()
        greedy = filters.get("top_k") == 1
        p_V = torch.nn.functional.one_hot(p_NV[0].argmax(), VOCAB).double() if greedy else exact(p_NV[0], **filters)
        assert p_value(verdict.emitted_BN[rides_B, 0], p_V) > FALSE_ALARM_RATE
        assert (verdict.emitted_BN[rides_B, 0] == verdict.last_B[rides_B]).all()
        _, without, _ = run_cycle(sampler, device, q_GV, p_NV, filters)
        assert (without.accept_lens_B > 1).any()
        for mixed, alone in ((verdict.emitted_BN, without.emitted_BN), (verdict.accept_lens_B, without.accept_lens_B)):
            assert torch.equal(mixed[~rides_B], alone[~rides_B])

    def test_a_draft_of_no_numbers_is_not_accepted(self, sampler, device):
        def spoil(draft):
            nothing = torch.full_like(draft.lse_GB, torch.nan)
            return Draft(draft.tokens_NB, draft.logits_GBV * torch.nan, draft.floor_GB, nothing)

        p_NV = make_logits(1, 3, VOCAB)
        for rides_B in (None, torch.arange(REQUESTS, device=device) % 2 == 0):
            _, verdict, _ = run_cycle(sampler, device, make_logits(1, 2, VOCAB), p_NV, {}, spoil=spoil, rides_B=rides_B)
            assert (verdict.accept_lens_B == 1).all()
            assert p_value(verdict.emitted_BN[:, 0], exact(p_NV[0])) > FALSE_ALARM_RATE

    def test_a_logit_that_is_no_number_shows(self, sampler, device):
        """In the log-probabilities: to leave it out, as a mask does with -inf, would hide a policy that is broken."""
        logits_BNV = make_logits(3, 1, 3, 9000)
        logits_BNV[0, 1, 5000], logits_BNV[0, 2, :4096] = torch.nan, -torch.inf
        lse_N = sampler.log_sum_exp(logits_BNV.to(device))[0].cpu()
        assert lse_N.isnan().tolist() == [False, True, False]

    def test_a_rider_of_which_a_mask_leaves_two_tokens(self, sampler, device):
        """As a grammar does: most of the vocabulary is forbidden in whole blocks."""
        vocab, rows, allowed = 12_000, 8, [5000, 5001]
        p_BNV = torch.full((rows, 2, vocab), -torch.inf)
        p_BNV[:, :, allowed] = 1.0
        params, random = make_params(rows, device), RandomState.create(1, torch.device(device))
        draft = Draft(
            torch.zeros((2, rows), dtype=torch.int64, device=device),
            make_logits(2, 1, rows, vocab).to(device),
            torch.empty((1, rows), device=device),
            torch.empty((1, rows), device=device),
        )
        sampler.draw(draft.logits_GBV[0], params, random, 0, draft.tokens_NB[1], draft.floor_GB[0], draft.lse_GB[0])
        rides_B = torch.ones(rows, dtype=torch.bool, device=device)
        verdict = sampler.judge(p_BNV.to(device), draft, params, random, rides_B)
        assert set(verdict.last_B.tolist()) == set(allowed)  # false alarm 2 ** -7, with this seed none
        expected = torch.full((rows, 2), 1.0).add(torch.tensor(2.0).log())
        torch.testing.assert_close(verdict.lse_BN.cpu(), expected)

    def test_greedy_requests_accept_while_the_argmax_agrees(self, sampler, device):
        q_GV, p_NV = make_logits(6, 3, VOCAB), make_logits(6, 4, VOCAB)
        p_NV[2] = -p_NV[2]  # the third draft is wrong
        draft, verdict, _ = run_cycle(sampler, device, q_GV, p_NV, {"top_k": 1})
        best = p_NV.argmax(-1)
        assert (draft.tokens_NB[1:].cpu() == q_GV.argmax(-1).view(-1, 1)).all()
        assert (verdict.accept_lens_B == 3).all()
        assert (verdict.emitted_BN.cpu() == torch.tensor([best[0], best[1], best[2], 0])).all()
        assert (verdict.last_B.cpu() == best[2]).all()

    def test_greedy_ties_go_to_the_first_token(self, sampler, device):
        p_NV = torch.zeros(2, VOCAB)
        draft, verdict, _ = run_cycle(sampler, device, torch.zeros(1, VOCAB), p_NV, {"top_k": 1})
        assert (draft.tokens_NB[1] == 0).all() and (verdict.emitted_BN == 0).all()

    def test_ties_at_the_floor_are_kept(self, sampler, device):
        logits = torch.zeros(1, VOCAB)
        logits[0, :3] = 2.0
        draft, _, _ = run_cycle(sampler, device, logits, torch.zeros(2, VOCAB), {"top_k": 2})
        assert set(draft.tokens_NB[1].tolist()) == {0, 1, 2}

    def test_masked_tokens_are_never_emitted(self, sampler, device):
        p_NV = make_logits(7, 2, VOCAB)
        p_NV[:, ::2] = -torch.inf
        _, verdict, _ = run_cycle(sampler, device, make_logits(8, 1, VOCAB), p_NV, {})
        assert (verdict.last_B % 2 == 1).all()
        assert p_value(verdict.emitted_BN[:, 0], exact(p_NV[0])) > FALSE_ALARM_RATE

    def test_cycles_and_steps_draw_independent_numbers(self, sampler, device):
        params = make_params(REQUESTS, device)
        logits = torch.zeros((REQUESTS, VOCAB), device=device)
        random = RandomState.create(3, torch.device(device))
        out = [torch.empty(REQUESTS, dtype=torch.int64, device=device) for _ in range(3)]
        floor, lse = torch.empty(REQUESTS, device=device), torch.empty(REQUESTS, device=device)
        sampler.draw(logits, params, random, 0, out[0], floor, lse)
        sampler.draw(logits, params, random, 1, out[1], floor, lse)
        random.advance()
        sampler.draw(logits, params, random, 0, out[2], floor, lse)
        pairs = ((out[0], out[1]), (out[0], out[2]), (out[0][:-1], out[0][1:]))
        for a, b in pairs:
            uniform = torch.full((VOCAB * VOCAB,), 1 / VOCAB**2, dtype=torch.float64)
            assert p_value(a * VOCAB + b, uniform) > FALSE_ALARM_RATE / len(pairs)

    @pytest.mark.parametrize("min_p", [0.0, 1e-30], ids=["alone", "beside another filter"])
    def test_top_p_of_one_keeps_every_token(self, sampler, device, min_p):
        """At a real vocabulary a float32 sum of the mass exceeds 1 well before the last token."""
        logits_BV = torch.stack([torch.zeros(REAL_VOCAB), 3 * make_logits(1, REAL_VOCAB)]).to(device)  # flat, peaked
        params = make_params(2, device, min_p=min_p)
        token_B = torch.empty(2, dtype=torch.int64, device=device)
        floor_B, lse_B = torch.empty(2, device=device), torch.empty(2, device=device)
        sampler.draw(logits_BV, params, RandomState.create(1, torch.device(device)), 0, token_B, floor_B, lse_B)
        assert ((logits_BV >= floor_B.view(-1, 1)).sum(-1) == REAL_VOCAB).all()
        torch.testing.assert_close(lse_B.double(), logits_BV.double().logsumexp(-1), rtol=1e-6, atol=1e-5)

    @pytest.mark.parametrize("top_p", [0.9, 0.999])
    def test_top_p_at_a_real_vocabulary(self, sampler, device, top_p):
        """Kept tokens are those of a float64 sum; a float32 cumulative sum keeps 11 more of the usual row at 0.999."""
        logits_BV = torch.stack([1e-4 * make_logits(1, REAL_VOCAB), make_logits(2, REAL_VOCAB)])  # nearly flat, usual
        p_BV = logits_BV.double().softmax(-1).sort(dim=-1, descending=True).values
        expected_B = (p_BV.cumsum(-1) - p_BV <= top_p).sum(-1)
        token_B = torch.empty(2, dtype=torch.int64, device=device)
        floor_B, lse_B = torch.empty(2, device=device), torch.empty(2, device=device)
        params, random = make_params(2, device, top_p=top_p), RandomState.create(1, torch.device(device))
        logits_BV = logits_BV.to(device)
        sampler.draw(logits_BV, params, random, 0, token_B, floor_B, lse_B)
        kept_B = (logits_BV >= floor_B.view(-1, 1)).sum(-1).cpu()
        assert ((kept_B - expected_B).abs() <= TOP_P_SLACK_TOKENS).all(), (kept_B, expected_B)

    def test_wide_rows_agree_with_the_reference(self, sampler, device):
        """Several blocks per row, a row length that is no multiple of a block, mixed settings."""
        from er_sglang.sampling.reference import ReferenceSampler

        vocab, rows, gamma = 10_007, 8, 4
        params = make_params(rows, "cpu")
        params.temperature_B[:] = torch.tensor([1, 1, 1, 1, 0.7, 1.3, 1, 1.0])
        params.top_k_B[:] = torch.tensor([1 << 30, 1, 50, 1 << 30, 1 << 30, 900, 1, 1 << 30])
        params.top_p_B[:] = torch.tensor([1, 1, 1, 0.8, 0.95, 0.5, 1, 1.0])
        params.min_p_B[:] = torch.tensor([0, 0, 0, 0, 0, 0.01, 0, 0.1])
        q_GBV, p_BNV = make_logits(9, gamma, rows, vocab), make_logits(10, rows, gamma + 1, vocab)
        p_BNV[:, :gamma] = q_GBV.transpose(0, 1) + 0.3 * p_BNV[:, :gamma]
        results = []
        for which, where in ((ReferenceSampler(), "cpu"), (sampler, device)):
            random = RandomState.create(11, torch.device(where))
            moved = SamplingParams(*(each.to(where) for each in params))
            draft = Draft(
                torch.zeros((gamma + 1, rows), dtype=torch.int64, device=where),
                q_GBV.to(where),
                torch.empty((gamma, rows), device=where),
                torch.empty((gamma, rows), device=where),
            )
            for step in range(gamma):
                which.draw(
                    draft.logits_GBV[step],
                    moved,
                    random,
                    step,
                    draft.tokens_NB[step + 1],
                    draft.floor_GB[step],
                    draft.lse_GB[step],
                )
            rides_B = torch.arange(rows, device=where) >= 6
            verdict = which.judge(p_BNV.to(where), draft, moved, random, rides_B)
            results.append(
                [t.cpu() for t in (draft.tokens_NB, verdict.emitted_BN, verdict.accept_lens_B, verdict.last_B)]
            )
            sampled = moved.top_k_B.cpu() > 1
            results[-1].append(draft.lse_GB.cpu()[:, sampled])
        for mine, theirs in zip(results[1][:-1], results[0][:-1]):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(results[1][-1], results[0][-1], rtol=1e-5, atol=1e-5)


FILTERED_ROWS = {
    "normal": lambda x: 3 * x,
    "bf16": lambda x: (3 * x).bfloat16().float(),  # as models give them: many equal values
    "near zero": lambda x: 1e-6 * x,
    "steep": lambda x: 40 * x,
    "masked": lambda x: torch.where(torch.arange(x.shape[-1]) % 50 == 3, x, -torch.inf),
    "blocks masked": lambda x: torch.where(torch.arange(x.shape[-1]) // 4096 == 1, x, -torch.inf),  # as by a grammar
    "equal": torch.zeros_like,
    "one far above": lambda x: torch.where(torch.arange(x.shape[-1]) == 70, 30.0, x),
}
FILTER_SETTINGS = {
    "top_k": [2, 50, 50, 1 << 30, 1 << 30, 40, 40, 50, 50, 4000, 1 << 30],
    "top_p": [1, 1, 0.95, 0.95, 0.3, 0.7, 0.7, 1, 0.9, 0.99, 1],
    "min_p": [0, 0, 0, 0, 0, 0, 0, 0.1, 0.02, 0, 0],
    "sequential": [0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0],
}


class FilterCases:
    """Of a fused sampler: it keeps the tokens that the reference keeps, and draws the same."""

    @pytest.mark.parametrize("rows", FILTERED_ROWS.values(), ids=FILTERED_ROWS)
    def test_filters_keep_what_the_reference_keeps(self, sampler, device, rows):
        from er_sglang.sampling.reference import ReferenceSampler

        count, vocab = len(FILTER_SETTINGS["top_k"]), 9001
        logits_BV = rows(make_logits(13, count, vocab))
        results = []
        for which, where in ((sampler, device), (ReferenceSampler(), "cpu")):
            params = make_params(count, where)
            for name, values in FILTER_SETTINGS.items():
                field = getattr(params, f"{name}_B")
                field.copy_(torch.tensor(values).to(field.dtype))
            token_B = torch.empty(count, dtype=torch.int64, device=where)
            floor_B, lse_B = torch.empty(count, device=where), torch.empty(count, device=where)
            random = RandomState.create(5, torch.device(where))
            which.draw(logits_BV.to(where), params, random, 0, token_B, floor_B, lse_B)
            results.append((logits_BV >= floor_B.cpu().view(-1, 1), token_B.cpu(), lse_B.cpu()))
        (kept_BV, token_B, lse_B), (expected_BV, expected_B, expected_lse_B) = results
        assert kept_BV.sum(-1).tolist() == expected_BV.sum(-1).tolist()
        assert torch.equal(token_B, expected_B)
        torch.testing.assert_close(lse_B, expected_lse_B, rtol=1e-5, atol=1e-5)


def test_reference_distribution_is_the_definition() -> None:
    for name, filters in FILTERS.items():
        logits = make_logits(12, 1, VOCAB)
        params = make_params(1, "cpu", **filters)
        x_BV = scale(logits, params)
        p_BV = distribution(x_BV, *summarize(x_BV, params), params.top_k_B <= 1)
        torch.testing.assert_close(p_BV[0].double(), exact(logits[0], **filters), rtol=1e-5, atol=1e-7, msg=name)
