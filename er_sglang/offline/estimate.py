"""Acceptance per draft position from the policy's own texts, as a server counts it that drafts gamma tokens a cycle.

Speculative sampling emits the policy's distribution, so a text sampled from the policy is a text that a server could
have emitted. A server judges a chain as one block (see Sampler): its first i drafts x_1 ... x_i are drawn with the
product of their q, and accepted with probability joint_i. A text that has these tokens has them with the product of
their p. The probability that they were accepted drafts, given the text, is the ratio of both, whatever follows: a
product of r_i = min(1, q(x_i) / (joint_(i-1) * p(x_i))), where p and q are those of the chain at that token. With it,
exactly and without drawing anything:

    start(s)    probability that a cycle starts at token s of the text, from start(0) = 1 and the r of all cycles before
    reach(s, i) product of r over the first i drafts of that cycle: all of them are accepted
    kept_i      sum over s of start(s) * reach(s, i - 1) * A(s, i), A = sum over x of min(p(x), q(x) / joint_(i-1))
    alpha_i     kept_i / kept_(i-1), with kept_0 = sum of start(s): conditional acceptance of the i-th draft

A is the expectation of r over the token, which makes kept_i unbiased and less noisy than with r itself. That contexts
after a rejection are harder, and that a later draft is tried only where the earlier ones were accepted, is all in it.
Chains that would run past the end of the text are left out.

Intervals are a bootstrap over prompts, 95 %: tokens of one response, and responses to one prompt, are not independent.
Differences between drafters are paired, on the same texts, and much narrower than the intervals of each. With fewer
than about ten prompts intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from er_sglang.offline.drafters import Outcome

RESAMPLES = 2000
LEVEL = 0.95


def cycle_starts(ratio_GT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(start [N], reach [gamma + 1, N]) for the N tokens of a response that a whole chain follows."""
    gamma, tokens = ratio_GT.shape
    count = tokens - gamma + 1
    reach = torch.ones(gamma + 1, max(count, 0), dtype=torch.float64)
    for depth in range(gamma):
        reach[depth + 1 :] *= ratio_GT[depth, depth : depth + count]
    stops = reach.clone()  # probability that exactly so many drafts are accepted
    stops[:-1] -= reach[1:]
    start = [0.0] * (len(reach[0]) + gamma + 1)
    start[0] = 1.0
    for s, row in enumerate(stops.T.tolist()):
        for accepted, probability in enumerate(row):
            start[s + accepted + 1] += start[s] * probability
    return torch.tensor(start[: len(reach[0])], dtype=torch.float64), reach


def tally(outcome: Outcome, first: int, edges: Sequence[int]) -> torch.Tensor:
    """kept_0 to kept_gamma of one response by context length, float64 [len(edges) - 1, gamma + 1].

    first: tokens before the response. A chain's context length is the number of tokens before its start.
    """
    start, reach = cycle_starts(outcome.ratio)
    gamma, count = len(outcome.ratio), len(start)
    kept = torch.empty(gamma + 1, count, dtype=torch.float64)
    kept[0] = start
    for depth in range(gamma):
        kept[depth + 1] = start * reach[depth] * outcome.expected[depth, depth : depth + count]
    context = first + torch.arange(count)
    inside = torch.stack([(context >= low) & (context < high) for low, high in zip(edges, edges[1:])])
    return inside.double() @ kept.T


def alphas(kept: torch.Tensor) -> torch.Tensor:
    """Conditional acceptance per draft position, from tallies [..., gamma + 1]."""
    return kept[..., 1:] / kept[..., :-1]


def accept_length(kept: torch.Tensor) -> torch.Tensor:
    """Tokens emitted per cycle, the bonus included."""
    return kept.sum(-1) / kept[..., 0]


def resampled(kept_P: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Bootstrap sums [RESAMPLES, gamma + 1] of tallies [prompts, gamma + 1]; equal resamples for equal shapes."""
    prompts = len(kept_P)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(prompts, (RESAMPLES, prompts), generator=generator)
    return kept_P[drawn].sum(1)


def interval(values: torch.Tensor) -> list[float]:
    """The middle LEVEL of resampled values [RESAMPLES]; those of resamples without any cycle, nan, are left out."""
    tail = (1.0 - LEVEL) / 2
    return torch.nanquantile(values, torch.tensor([tail, 1.0 - tail], dtype=values.dtype)).tolist()
