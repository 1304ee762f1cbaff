"""GRPO, as plain as it gets: group-relative advantages, a clipped importance ratio, no critic, no KL term.

Shapes: R rollouts, in groups of one prompt each; T tokens of the longest sequence, prompt included; N response tokens
of all rollouts, row by row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from launch.grpo.place import Place
from launch.grpo.rollouts import NamedTensors, Rollout

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # the upper end as in DAPO
MINIBATCHES = 2
MICROBATCH_TOKENS = 8192  # padding included; bounds activations and logits
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rollouts as padded tensors; position t of the last two belongs to token t + 1."""

    tokens_RT: torch.Tensor
    response_RT: torch.Tensor
    """True where token t + 1 was sampled."""
    logprobs_RT: torch.Tensor
    """What the server says the policy gave token t + 1 when it was sampled."""
    advantages_R: torch.Tensor

    def rows(self, rows: torch.Tensor) -> "Batch":
        return Batch(**{name: getattr(self, name)[rows] for name in self.__slots__})

    def microbatches(self) -> Iterator["Batch"]:
        """Rows of like length, as wide as the longest of them."""
        lengths_R = self.response_RT.shape[1] + 1 - self.response_RT.flip(1).int().argmax(1)
        rows, width = [], 0
        for row in lengths_R.argsort(descending=True).tolist():
            if rows and width * (len(rows) + 1) > MICROBATCH_TOKENS:
                yield self._part(rows, width)
                rows = []
            width = width if rows else int(lengths_R[row])
            rows.append(row)
        yield self._part(rows, width)

    def _part(self, rows: list[int], width: int) -> "Batch":
        return Batch(
            tokens_RT=self.tokens_RT[rows, :width],
            response_RT=self.response_RT[rows, : width - 1],
            logprobs_RT=self.logprobs_RT[rows, : width - 1],
            advantages_R=self.advantages_R[rows],
        )


def make_batch(rollouts: Sequence[Rollout], rewards_R: torch.Tensor, group: int, device: torch.device) -> Batch:
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
        tokens_RT=tokens_RT.to(device),
        response_RT=response_RT.to(device),
        logprobs_RT=logprobs_RT.to(device),
        advantages_R=group_advantages(rewards_R, group).to(device),
    )


def group_advantages(rewards_R: torch.Tensor, group: int) -> torch.Tensor:
    """Each reward against its group's mean, in the group's standard deviations; 0 where all are equal."""
    grouped = rewards_R.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).flatten()


def log_ratios(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """ln(policy now / policy that sampled) of every response token: float32 [N]."""
    # Rows are padded at their ends, so a causal model needs no mask. Only the logits of response tokens are computed.
    hidden_RTH = model.model(input_ids=batch.tokens_RT[:, :-1], use_cache=False).last_hidden_state
    logits_NV = model.lm_head(hidden_RTH[batch.response_RT])
    sampled_N = batch.tokens_RT[:, 1:][batch.response_RT]
    now_N = -torch.nn.functional.cross_entropy(logits_NV.float(), sampled_N, reduction="none")
    return now_N - batch.logprobs_RT[batch.response_RT]


def policy_loss(log_ratios_N: torch.Tensor, batch: Batch) -> torch.Tensor:
    """PPO's clipped objective, summed over the response tokens."""
    ratio_N = log_ratios_N.exp()
    clipped_N = ratio_N.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
    advantages_N = batch.advantages_R.repeat_interleave(batch.response_RT.sum(1))
    return -torch.minimum(ratio_N * advantages_N, clipped_N * advantages_N).sum()


class Trainer:
    """A policy, and AdamW on float32 masters of its weights: the weights themselves where they are float32."""

    def __init__(self, checkpoint: Path, place: Place, learning_rate: float) -> None:
        self._place = place
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=place.dtype).to(place.device)
        self._weights = list(self._model.parameters())
        self._masters = [weight.detach().float() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(self._masters, lr=learning_rate, betas=BETAS, weight_decay=0.0)

    def weights(self) -> NamedTensors:
        return list(self._model.named_parameters())

    def step(self, rollouts: Sequence[Rollout], rewards_R: torch.Tensor, group: int) -> torch.Tensor:
        """One pass over the rollouts in MINIBATCHES optimiser steps, each over the mean of its response tokens.

        Returns |ln ratio| of the first one's tokens, [N], before which the model is still the policy that sampled:
        0 but for rounding if, and only if, the server's log-probabilities are the policy's own.
        """
        batch = make_batch(rollouts, rewards_R, group, self._place.device)
        off_policy = []
        for number, rows in enumerate(torch.randperm(len(rollouts)).chunk(MINIBATCHES)):
            minibatch = batch.rows(rows.to(self._place.device))
            response_tokens = minibatch.response_RT.sum()
            for microbatch in minibatch.microbatches():
                log_ratios_N = log_ratios(self._model, microbatch)
                (policy_loss(log_ratios_N, microbatch) / response_tokens).backward()
                self._collect_gradients()
                if number == 0:
                    off_policy.append(log_ratios_N.detach().abs())
            self._optimise()
        return torch.cat(off_policy).cpu()

    def _collect_gradients(self) -> None:
        for master, weight in zip(self._masters, self._weights):
            master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
            weight.grad = None

    @torch.no_grad()
    def _optimise(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._masters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for master, weight in zip(self._masters, self._weights):
            weight.copy_(master)
