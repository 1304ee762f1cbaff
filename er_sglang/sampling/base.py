"""The records that pass between drafting and verifying, and the two verbs of a sampler.

A request's sampling distribution is ``softmax(logits / temperature)`` restricted to the tokens that survive its
filters, all judged on the unfiltered distribution (the "joint" order of SGLang's sampler):

    top_k   fewer than k tokens are strictly more probable
    top_p   the strictly more probable tokens hold at most top_p of the mass
    min_p   the probability is at least min_p times the largest

In sequence, as SGLang filters on CUDA while min_p is in the batch, each filter renormalizes: top_p is then a share of
the mass that top_k keeps. (min_p is a ratio, the same in either order.)

Each filter keeps every token above some value, so a row's distribution is known from its logits and two numbers:
``floor`` (the smallest scaled logit kept) and ``lse`` (log of the kept mass). Ties at the floor are kept.
A request with top_k = 1 is greedy: all mass on the first of its largest logits.

Names of axes: B requests, G = gamma drafted tokens, N = gamma + 1 verified tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Which random numbers a kernel draws: the third word of the generator's counter. Drafted token i uses stream i.
STREAM_ACCEPT = 1 << 16
STREAM_RESIDUAL = 1 << 17

LEAST_FLOAT = 2.0**-126  # the smallest normal float32


class SamplingParams(NamedTuple):
    """Per-request settings, tensors of shape [B]: float32 except ``top_k_B`` (int32) and ``sequential_B`` (bool).

    sequential_B: the filters apply in sequence, not jointly.
    """

    temperature_B: torch.Tensor
    top_k_B: torch.Tensor
    top_p_B: torch.Tensor
    min_p_B: torch.Tensor
    sequential_B: torch.Tensor


@dataclass(slots=True)
class RandomState:
    """Counter-based random numbers (Philox 4x32): a function of (seed, cycle, stream, request row, token).

    ``state`` is int64 [2] on the device: seed, with the replica in its upper half, and cycle. Every rank of a replica
    holds the same seed and advances in step, so ranks that see the same logits draw the same tokens without talking to
    each other.
    """

    state: torch.Tensor

    @classmethod
    def create(cls, seed: int, device: torch.device, replica: int = 0) -> RandomState:
        """seed: below 2**32, equal on all ranks. replica: copies of one prompt on two of them are independent
        samples."""
        return cls(torch.tensor([seed + (replica << 32), 0], dtype=torch.int64, device=device))

    def advance(self) -> None:
        """Start the next cycle; on CUDA this is part of the draft's graph."""
        self.state[1:].add_(1)


@dataclass(slots=True)
class Draft:
    """What the drafter proposed and the distributions it drew from.

    tokens_NB: int64 [N, B]; row 0 is the cycle's first input (the last emitted token), row i the i-th drafted token.
    logits_GBV: float32 [G, B, V]; ``logits_GBV[i]`` is what token i + 1 was drawn from.
    floor_GB, lse_GB: float32 [G, B], see the module's docstring.
    """

    tokens_NB: torch.Tensor
    logits_GBV: torch.Tensor
    floor_GB: torch.Tensor
    lse_GB: torch.Tensor

    @property
    def gamma(self) -> int:
        return self.tokens_NB.shape[0] - 1

    def first(self, gamma: int) -> Draft:
        """The draft as it was when ``gamma`` tokens were drawn; shares memory."""
        return Draft(self.tokens_NB[: gamma + 1], self.logits_GBV[:gamma], self.floor_GB[:gamma], self.lse_GB[:gamma])


@dataclass(slots=True)
class Verdict:
    """What the policy made of a draft.

    emitted_BN: int64 [B, N]; row b holds its ``accept_lens_B[b]`` emitted tokens, then zeros.
    accept_lens_B: int32 [B]; emitted tokens, accepted drafts + 1.
    last_B: int64 [B]; the last emitted token, first input of the next cycle.
    lse_BN: float32 [B, N]; log-sum-exps of the policy's scaled logits, before filters.
    """

    emitted_BN: torch.Tensor
    accept_lens_B: torch.Tensor
    last_B: torch.Tensor
    lse_BN: torch.Tensor


class Sampler(ABC):
    """Speculative sampling by block verification, Sun et al. 2024 (arXiv 2403.10444), algorithm 2, for a chain.

    The emitted tokens follow p, as by the rule of Leviathan et al. 2023 (arXiv 2211.17192), which accepts token after
    token with min(1, p / q). Here what a token has too much of p makes up for what earlier ones lacked: with drafted
    tokens x_1 to x_G, p_i and q_i the distributions of the token after the first i of them,

        joint_0 = 1,  joint_i = min(1, joint_(i-1) * p_(i-1)(x_i) / q_(i-1)(x_i))
        rest_i  = sum over x of max(joint_i * p_i(x) - q_i(x), 0)
        stop_i  = rest_i / (rest_i + 1 - joint_i) for i < G,  joint_G for i = G;  1 where joint_i = 1

    Of independent events with probabilities stop_i, the last that happens says how many drafts are accepted; stop_0 = 1
    always does. Given the first i drafts, they are accepted with probability joint_i, which is never less than the product
    of their min(1, p / q), and equal to it for the first. Then a token is drawn from max(joint_i * p_i - q_i, 0), after the
    last draft from p.

    simulated_acceptance: accept each drafted token with this probability instead of the rule. The output is then
        NOT the policy's; it exists to time random weights at a stated acceptance.
    """

    def __init__(self, simulated_acceptance: float | None = None) -> None:
        self.simulated_acceptance = simulated_acceptance

    @abstractmethod
    def draw(
        self,
        logits_BV: torch.Tensor,
        params: SamplingParams,
        random: RandomState,
        step: int,
        token_B: torch.Tensor,
        floor_B: torch.Tensor,
        lse_B: torch.Tensor,
    ) -> None:
        """Draw drafted token ``step`` (0-based) of every request; writes ``token_B``, ``floor_B`` and ``lse_B``."""

    @abstractmethod
    def judge(
        self,
        logits_BNV: torch.Tensor,
        draft: Draft,
        params: SamplingParams,
        random: RandomState,
        rides_B: torch.Tensor | None = None,
    ) -> Verdict:
        """Accept a number of drafts and draw the token after them. Requests that ride along accept nothing and draw
        from p.

        logits_BNV: float32, the policy's logits after each of the N tokens.
        rides_B: bool; None if no request rides along.
        """

    @abstractmethod
    def log_sum_exp(self, logits_BNV: torch.Tensor) -> torch.Tensor:
        """Of float32 logits, [B, N]."""
