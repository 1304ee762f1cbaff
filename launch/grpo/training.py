"""GRPO, as plain as it gets: group-relative advantages, a clipped importance ratio, no critic, no KL term.

Shapes: R rollouts, in groups of one prompt each; T tokens of the longest sequence, prompt included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from launch.grpo.rollouts import Rollout

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # the upper end as in DAPO
MINIBATCHES = 2
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rollouts as padded tensors; position t of the last three belongs to token t + 1."""

    tokens_RT: torch.Tensor
    response_RT: torch.Tensor
    """True where token t + 1 was sampled."""
    logprobs_RT: torch.Tensor
    """What the server says the policy gave token t + 1 when it was sampled."""
    advantages_R: torch.Tensor

    def rows(self, rows: torch.Tensor) -> "Batch":
        return Batch(**{name: getattr(self, name)[rows] for name in self.__slots__})


def make_batch(rollouts: Sequence[Rollout], rewards_R: torch.Tensor, group: int) -> Batch:
    """`rollouts` come in runs of `group` that answer the same prompt."""
    width = max(len(r.prompt) + len(r.response) for r in rollouts)
    tokens_RT = torch.zeros(len(rollouts), width, dtype=torch.int64)
    response_RT = torch.zeros(len(rollouts), width - 1, dtype=torch.bool)
    logprobs_RT = torch.zeros(len(rollouts), width - 1)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt), len(rollout.prompt) + len(rollout.response)
        tokens_RT[row, :end] = torch.tensor(rollout.prompt + rollout.response)
        response_RT[row, start - 1 : end - 1] = True
        logprobs_RT[row, start - 1 : end - 1] = torch.tensor(rollout.logprobs)
    return Batch(
        tokens_RT=tokens_RT,
        response_RT=response_RT,
        logprobs_RT=logprobs_RT,
        advantages_R=group_advantages(rewards_R, group),
    )


def group_advantages(rewards_R: torch.Tensor, group: int) -> torch.Tensor:
    """Each reward against its group's mean, in the group's standard deviations; 0 where all are equal."""
    grouped = rewards_R.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


def log_ratios(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """ln(policy now / policy that sampled) of every response token, 0 elsewhere: float32 [R, T - 1]."""
    logits_RTV = model(input_ids=batch.tokens_RT).logits[:, :-1]
    now_RT = logits_RTV.log_softmax(2).gather(2, batch.tokens_RT[:, 1:, None]).squeeze(2)
    return (now_RT - batch.logprobs_RT) * batch.response_RT


def policy_loss(log_ratios_RT: torch.Tensor, batch: Batch) -> torch.Tensor:
    """PPO's clipped objective, averaged over the response tokens."""
    ratio_RT = log_ratios_RT.exp()
    clipped_RT = ratio_RT.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    advantages_RT = batch.advantages_R[:, None]
    gain_RT = torch.minimum(ratio_RT * advantages_RT, clipped_RT * advantages_RT)
    return -gain_RT[batch.response_RT].mean()


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """One pass over the batch in MINIBATCHES optimiser steps.

    Returns the largest |ln ratio| of the first one, before which the model is still the policy that sampled:
    0 but for rounding if, and only if, the server's log-probabilities are the policy's own.
    """
    off_policy = []
    for rows in torch.randperm(len(batch.tokens_RT)).chunk(MINIBATCHES):
        minibatch = batch.rows(rows)
        log_ratios_RT = log_ratios(model, minibatch)
        off_policy.append(log_ratios_RT.detach().abs().max().item())
        optimizer.zero_grad(set_to_none=True)
        policy_loss(log_ratios_RT, minibatch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
    return off_policy[0]
