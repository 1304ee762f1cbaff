"""What shapes a request's logits before they are sampled from: penalties of the tokens it has emitted, and its bias.

SGLang's definition, in its order, for a request that has emitted token t ``count[t]`` times:

    logit -= frequency * count + presence                    where count > 0
    logit  = logit * repetition  if logit < 0  else  logit / repetition          where count > 0
    logit  = -inf                                            for its stop tokens, before min_new_tokens
    logit += bias

Position i of a cycle follows the drafted tokens 1 to i, so these count, too: for p and for q alike.

Counts are kept on the device, int32 [1 + requests, V + 4]: a row for each penalised request. A word is a token's count,
plus STOP if it is a stop token; after the vocabulary come ``frequency``, ``presence``, ``repetition`` and
``least_tokens`` as float32 bits. Row 0 belongs to everybody else and changes nothing.

Names of axes: B requests, N positions, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

STOP = 1 << 30


@dataclass(frozen=True, slots=True)
class RequestPenalties:
    """One request's settings and what it has emitted.

    least_tokens: length of the request, prompt included, before which ``stop_tokens`` must not come.
    """

    frequency: float
    presence: float
    repetition: float
    least_tokens: int
    stop_tokens: Collection[int]
    emitted: Sequence[int]


@dataclass(slots=True)
class Penalties:
    """A step's view of the table. words: int32 [rows, V + 4]. rows: of each of its B requests, 0 if unpenalised."""

    words: torch.Tensor
    rows: Sequence[int]


class PenaltyTable:
    """The counts; grows by doubling, so that it takes 4 to 8 bytes times the vocabulary for a penalised request."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self.words = torch.zeros((1, vocab_size + 4), dtype=torch.int32, device=device)
        self._settings[0, 2] = 1.0

    @property
    def _settings(self) -> torch.Tensor:
        return self.words[:, self._vocab_size :].view(torch.float32)

    def reset(self, requests: Mapping[int, RequestPenalties]) -> None:
        """Begin anew with ``requests``, by row."""
        if (least := max(requests) + 1) > len(self.words):
            grown = self.words.new_zeros((max(least, 2 * len(self.words)), self.words.shape[1]))
            grown[: len(self.words)] = self.words
            self.words = grown
        rows = self._on_device(list(requests), torch.int64)
        settings = [[r.frequency, r.presence, r.repetition, r.least_tokens] for r in requests.values()]
        self.words.index_fill_(0, rows, 0)  # `[...] = 0` would wait for the GPU
        self._settings[rows] = self._on_device(settings, torch.float32)
        index, value = [], []
        for row, request in requests.items():
            stop_tokens = [token for token in request.stop_tokens if 0 <= token < self._vocab_size]
            index += [row * self.words.shape[1] + token for token in (*request.emitted, *stop_tokens)]
            value += [1] * len(request.emitted) + [STOP] * len(stop_tokens)
        self.words.view(-1).index_add_(0, self._on_device(index, torch.int64), self._on_device(value, torch.int32))

    def shrink(self) -> None:
        """Forget all requests."""
        self.words = self.words[:1].clone()

    def of(self, rows: Sequence[int]) -> Penalties:
        return Penalties(self.words, rows)

    def _on_device(self, values: Sequence, dtype: torch.dtype) -> torch.Tensor:
        device = self.words.device
        return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def shaped(
    logits_BV: torch.Tensor, words_BW: torch.Tensor, lens_B: torch.Tensor, drafted_JB: torch.Tensor
) -> torch.Tensor:
    """Penalised logits [B, V]. words_BW: rows of the table. lens_B: length of each request, prompt and the drafted
    tokens ``drafted_JB`` included."""
    size = logits_BV.shape[1]
    frequency_B1, presence_B1, repetition_B1, least_B1 = words_BW[:, size:].view(torch.float32).split(1, dim=1)
    words_BV = words_BW[:, :size]
    count_BV = (words_BV & (STOP - 1)).scatter_add_(
        1, drafted_JB.t(), torch.ones_like(drafted_JB.t(), dtype=torch.int32)
    )
    seen_BV = count_BV > 0
    x_BV = logits_BV - (frequency_B1 * count_BV + presence_B1 * seen_BV)
    x_BV = torch.where(seen_BV, torch.where(x_BV < 0, x_BV * repetition_B1, x_BV / repetition_B1), x_BV)
    return x_BV.masked_fill_((words_BV >= STOP) & (lens_B.view(-1, 1) < least_B1), -torch.inf)


class Shaper(ABC):
    """Shapes the logits of one step after another; only penalised or biased requests cost anything."""

    @abstractmethod
    def load(self, penalties: Penalties | None, bias_BV: torch.Tensor | None) -> None:
        """Begin a step. bias_BV: float32."""

    @abstractmethod
    def shape(
        self, logits_RV: torch.Tensor, committed_B: torch.Tensor, drafted_GB: torch.Tensor, first: int = 0
    ) -> None:
        """In place, on float32 logits [B * positions, V], request-major, of positions ``first``, ``first`` + 1, ...

        committed_B: int64, length of each request without its last emitted token.
        drafted_GB: int64; position i follows the first i of them.
        """

    @abstractmethod
    def count(self, emitted_BN: torch.Tensor, accept_lens_B: torch.Tensor) -> None:
        """End a step with penalties: each request has emitted the first ``accept_lens_B`` of its tokens."""


class ReferenceShaper(Shaper):
    def load(self, penalties, bias_BV) -> None:
        self._penalties, self._bias_BV = penalties, bias_BV

    def shape(self, logits_RV, committed_B, drafted_GB, first=0) -> None:
        batch, size = committed_B.shape[0], logits_RV.shape[1]
        for i, logits_BV in enumerate(logits_RV.view(batch, -1, size).unbind(1), start=first):
            if self._penalties is not None:
                words_BW = self._penalties.words[self._penalties.rows]
                logits_BV.copy_(shaped(logits_BV, words_BW, committed_B + 1 + i, drafted_GB[:i]))
            if self._bias_BV is not None:
                logits_BV += self._bias_BV

    def count(self, emitted_BN, accept_lens_B) -> None:
        words = self._penalties.words
        rows_B = torch.tensor(self._penalties.rows, device=words.device)
        index_BN = rows_B.view(-1, 1) * words.stride(0) + emitted_BN
        is_emitted_BN = torch.arange(emitted_BN.shape[1], device=words.device) < accept_lens_B.view(-1, 1)
        words.view(-1).index_add_(0, index_BN.view(-1), is_emitted_BN.view(-1).int())
