"""What a policy must emit, from transformers in float32: exact next-token distributions and greedy continuations.

The definition of penalties, biases and filters is SGLang's, written down here a second time, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Sampling parameters of a request, by SGLang's names; ``params()`` is what goes into the request."""

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def params(self, new_tokens: int) -> dict:
        values = {name: getattr(self, name) for name in self.__slots__ if name != "logit_bias"}
        if self.logit_bias:
            values["logit_bias"] = {str(token): bias for token, bias in self.logit_bias}
        return {**values, "max_new_tokens": new_tokens, "ignore_eos": True}

    def penalised(self, logits_NV: torch.Tensor, history_NT: torch.Tensor) -> torch.Tensor:
        """Logits after penalties for the tokens emitted so far (history) and the bias."""
        logits_NV = logits_NV.double()
        count_NV = torch.zeros_like(logits_NV)
        count_NV.scatter_add_(1, history_NT, torch.ones_like(history_NT, dtype=torch.float64))
        seen_NV = count_NV > 0
        logits_NV = logits_NV - self.frequency_penalty * count_NV - self.presence_penalty * seen_NV
        scaled_NV = torch.where(logits_NV < 0, logits_NV * self.repetition_penalty, logits_NV / self.repetition_penalty)
        logits_NV = torch.where(seen_NV, scaled_NV, logits_NV)
        for token, bias in self.logit_bias:
            logits_NV[:, token] += bias
        return logits_NV

    def kept(self, p_NV: torch.Tensor, slack: float = 0.0) -> torch.Tensor:
        """Tokens that survive the filters, each judged on the unfiltered ``p_NV``; ``slack`` allows for rounding."""
        sorted_NV, order_NV = p_NV.sort(dim=1, descending=True)
        kept_NV = sorted_NV >= self.min_p * sorted_NV[:, :1] * (1 - slack)
        kept_NV &= sorted_NV.cumsum(1) - sorted_NV <= self.top_p + slack
        if self.top_k > 0:
            kept_NV &= sorted_NV >= sorted_NV[:, self.top_k - 1 : self.top_k] * (1 - slack)
        return torch.zeros_like(kept_NV).scatter_(1, order_NV, kept_NV)

    def distribution(self, logits_NV: torch.Tensor, history_NT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Exact probabilities [N, V], and which tokens may appear at all."""
        p_NV = (self.penalised(logits_NV, history_NT) / self.temperature).softmax(1)
        filtered_NV = p_NV * self.kept(p_NV)
        return filtered_NV / filtered_NV.sum(1, keepdim=True), self.kept(p_NV, slack=1e-4)


class Oracle:
    """A checkpoint in transformers, float32."""

    def __init__(self, policy: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, sequences_NT: torch.Tensor) -> torch.Tensor:
        """Next-token logits [N, T, V] after each token of sequences of one length."""
        return torch.cat([self._model(rows).logits for rows in sequences_NT.split(512)])

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        assert new_tokens > 0
        sequence = torch.tensor([prompt])
        with torch.inference_mode():
            cache = self._model(sequence, use_cache=True)
            output = []
            while True:
                output.append(int(cache.logits[0, -1].argmax()))
                if len(output) == new_tokens:
                    return output
                token = torch.tensor([[output[-1]]])
                cache = self._model(token, past_key_values=cache.past_key_values, use_cache=True)
