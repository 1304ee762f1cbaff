"""The sampler in plain torch: what the fused one is tested against, and what CPU serving runs."""

from __future__ import annotations

import torch

from er_sglang.sampling.base import (
    LEAST_FLOAT,
    STREAM_ACCEPT,
    STREAM_RESIDUAL,
    RandomState,
    Sampler,
    SamplingParams,
    Verdict,
)
from er_sglang.sampling.philox import exponential, philox, uniform


def scale(logits_BV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Logits over temperature, float32 [B, V]."""
    return logits_BV.float() / params.temperature_B.view(-1, 1)


def summarize(x_BV: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """(floor_B, lse_B) of scaled logits: the smallest kept value and the log of the kept mass."""
    sorted_BV, _ = x_BV.sort(dim=-1, descending=True)
    # float64: over a whole vocabulary a float32 sum drifts by more than a token's mass.
    prob_BV = sorted_BV.double().softmax(-1)
    mass_before_BV = prob_BV.cumsum(-1) - prob_BV
    # The first of equal values speaks for all of them: what lies strictly above it lies strictly above each.
    first_BV = torch.searchsorted(-sorted_BV, -sorted_BV, right=False)
    by_rank_BV = first_BV < params.top_k_B.view(-1, 1)
    mass_by_rank_B = prob_BV.masked_fill(~by_rank_BV, 0).sum(-1)
    limit_B = params.top_p_B * torch.where(params.sequential_B, mass_by_rank_B, 1)
    # Rounded sums exceed 1, and top_p = 1 keeps every token.
    limit_B = limit_B.masked_fill(params.top_p_B >= 1, torch.inf)
    kept_BV = (
        by_rank_BV
        & (mass_before_BV.gather(1, first_BV) <= limit_B.view(-1, 1))
        & (sorted_BV >= sorted_BV[:, :1] + params.min_p_B.view(-1, 1).log())
    )
    floor_B = sorted_BV.masked_fill(~kept_BV, torch.inf).amin(-1)
    return floor_B, sorted_BV.masked_fill(~kept_BV, -torch.inf).logsumexp(-1)


def distribution(
    x_BV: torch.Tensor, floor_B: torch.Tensor, lse_B: torch.Tensor, greedy_B: torch.Tensor
) -> torch.Tensor:
    """Probabilities [B, V] of the sampling distribution of scaled logits."""
    p_BV = torch.where(x_BV >= floor_B.view(-1, 1), (x_BV - lse_B.view(-1, 1)).exp(), 0.0)
    one_hot_BV = torch.nn.functional.one_hot(x_BV.argmax(-1), x_BV.shape[-1]).to(p_BV.dtype)
    return torch.where(greedy_B.view(-1, 1), one_hot_BV, p_BV)


def race(weight_BV: torch.Tensor, random: RandomState, stream: int) -> torch.Tensor:
    """A token of each row with probability proportional to its weight: the first arrival of Poisson processes."""
    rows = torch.arange(weight_BV.shape[0], device=weight_BV.device).view(-1, 1)
    tokens = torch.arange(weight_BV.shape[1], device=weight_BV.device).view(1, -1)
    arrival_BV = exponential(philox(random.state, tokens, rows, stream))
    return (weight_BV.log() - arrival_BV.log()).argmax(-1)


def residual(p_BV: torch.Tensor, q_BV: torch.Tensor, joint_B: torch.Tensor) -> torch.Tensor:
    """Weights of the token after the accepted drafts, where there were more: what is left of p."""
    return (joint_B.view(-1, 1) * p_BV - q_BV).clamp_min(0)


class ReferenceSampler(Sampler):
    def draw(self, logits_BV, params, random, step, token_B, floor_B, lse_B) -> None:
        x_BV = scale(logits_BV, params)
        floor, lse = summarize(x_BV, params)
        floor_B.copy_(floor)
        lse_B.copy_(lse)
        token_B.copy_(race(distribution(x_BV, floor, lse, params.top_k_B <= 1), random, step))

    def judge(self, logits_BNV, draft, params, random, rides_B=None) -> Verdict:
        batch, width, _ = logits_BNV.shape
        greedy_B = params.top_k_B <= 1
        rows_B = torch.arange(batch, device=logits_BNV.device)
        joint_B = torch.ones(batch, device=logits_BNV.device)
        accepted_B = torch.zeros(batch, dtype=torch.int64, device=logits_BNV.device)
        weight_BV = torch.zeros((), device=logits_BNV.device)
        lse_BN = torch.empty((batch, width), dtype=torch.float32, device=logits_BNV.device)
        if rides_B is None:
            rides_B = torch.zeros_like(greedy_B)
        for position in range(width):
            x_BV = scale(logits_BNV[:, position], params)
            lse_BN[:, position] = x_BV.logsumexp(-1)
            p_BV = distribution(x_BV, *summarize(x_BV, params), greedy_B)
            u_B = uniform(philox(random.state, torch.full_like(rows_B, position), rows_B, STREAM_ACCEPT))
            if position == draft.gamma:
                rest_BV, stops_B = p_BV, joint_B
            else:
                q_BV = distribution(
                    scale(draft.logits_GBV[position], params),
                    draft.floor_GB[position],
                    draft.lse_GB[position],
                    greedy_B,
                )
                rest_BV = residual(p_BV, q_BV, joint_B)
                rest_B = rest_BV.sum(-1)
                stops_B = torch.where(joint_B >= 1, 1.0, rest_B / (rest_B + 1 - joint_B))
                # Where p = q nothing is left, so that a stop there is rounding; and riders have no drafts.
                rest_BV = torch.where(((rest_B > 0) & ~rides_B).view(-1, 1), rest_BV, p_BV)
            stop_B = u_B <= stops_B
            accepted_B = torch.where(stop_B, position, accepted_B)
            weight_BV = torch.where(stop_B.view(-1, 1), rest_BV, weight_BV)
            if position < draft.gamma:
                token_B = draft.tokens_NB[position + 1]
                if self.simulated_acceptance is None:
                    p_B, q_B = p_BV[rows_B, token_B], q_BV[rows_B, token_B]
                    ratio_B = joint_B * p_B / q_B.clamp_min(LEAST_FLOAT)
                    joint_B = torch.where(q_B > 0, ratio_B, 0).clamp_max(1)  # a draft of no numbers is not accepted
                else:
                    joint_B = joint_B * (u_B < self.simulated_acceptance)
                joint_B = joint_B.masked_fill(rides_B, 0)
        last_B = race(weight_BV, random, STREAM_RESIDUAL)
        return Verdict(
            emitted_BN=compose(draft.tokens_NB, accepted_B, last_B),
            accept_lens_B=(accepted_B + 1).to(torch.int32),
            last_B=last_B,
            lse_BN=lse_BN,
        )

    def log_sum_exp(self, logits_BNV) -> torch.Tensor:
        return logits_BNV.logsumexp(-1)


def compose(tokens_NB: torch.Tensor, accepted_B: torch.Tensor, last_B: torch.Tensor) -> torch.Tensor:
    """The emitted tokens [B, N]: the accepted drafts, then the token drawn after them."""
    width = tokens_NB.shape[0]
    position_N = torch.arange(width, device=accepted_B.device)
    drafted_BN = torch.cat([tokens_NB[1:], tokens_NB[:1]]).t()
    emitted_BN = torch.where(position_N < accepted_B.view(-1, 1), drafted_BN, 0)
    return emitted_BN.scatter_(1, accepted_B.view(-1, 1), last_B.view(-1, 1))
