"""The drafters to compare: a weight format, an attention window and a head each. What each would have proposed.

Weights go through the reference quantizers, which define the server's numbers, in the checkpoint's dtype. fp8 differs
in one point: on CUDA a server rounds the activations to e4m3, too, and this does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import PreTrainedModel

from er_sglang.drafting.rescoring import rescore_
from er_sglang.errors import ConfigError
from er_sglang.offline.chain import Chosen, DraftPass, Listening, PolicyPass, Recent, chained_attention
from er_sglang.quantize import create_format
from er_sglang.sampling.base import LEAST_FLOAT

CHUNK = 128  # positions whose whole distributions are in memory: float32 [CHUNK, V], a few of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """The quantized Linear layers: "int4", "int4_asym" or "fp8" (whose group size is of its head alone)."""

    format: str
    group_size: int

    def __str__(self) -> str:
        return self.format if self.format == "fp8" else f"{self.format} g{self.group_size}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafter:
    """attention_window, window_by: as in a server's config; the window 0 is all, by either rule.
    head: "int4" quantizes lm_head, too, symmetric; "int4_rescored" has its leading tokens scored again with the policy's
    rows; "policy" shares the policy's.
    """

    weights: Weights
    attention_window: int = 0
    window_by: str = "recency"
    head: str = "int4"


@dataclass(slots=True)
class Quantized:
    """A copy of the policy's weights: dequantized, by name; the bytes that its packed form holds; and what is not
    converted, by name, with the reason."""

    weights: dict[str, torch.Tensor]
    nbytes: int
    kept: dict[str, str]


@dataclass(slots=True)
class Outcome:
    """What the policy makes of one drafter's proposals over a text. Row d is of depth d, column t is about the token
    after the t-th of the response.

    expected: probability that the drafted token is accepted, given that those before it in its chain are. ratio: the
    same, given also the token that the text has. Both float64 [gamma, T]; column t of row d belongs to the chain that
    starts at t - d, so the first d are void.
    """

    expected: torch.Tensor
    ratio: torch.Tensor


class Policy:
    """A transformers model with what is needed to draft for it."""

    def __init__(self, model: PreTrainedModel, stored_dtype: torch.dtype) -> None:
        """stored_dtype: of the checkpoint, in which a server quantizes."""
        if windowed := set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}:
            raise ConfigError(f"layers with {', '.join(sorted(windowed))} cannot be drafted for here.")
        self.model = model
        self.backbone = model.base_model
        self.head = model.get_output_embeddings()
        self._stored_dtype = stored_dtype

    def quantize(self, weights: Weights) -> Quantized:
        """Every Linear of the decoder layers."""
        copy = Quantized({}, 0, {})
        for name, module in self.backbone.named_modules():
            if isinstance(module, torch.nn.Linear):
                self._quantize(module, f"{name}.weight", weights, copy)
        if not copy.weights:
            raise ConfigError(f"no Linear layer can be converted to {weights}: {sorted(set(copy.kept.values()))}.")
        return copy

    def quantize_head(self, group_size: int) -> Quantized:
        copy = Quantized({}, 0, {})
        self._quantize(self.head, "weight", Weights(format="int4", group_size=group_size), copy)
        if copy.kept:
            raise ConfigError(f"lm_head cannot be converted to int4: {copy.kept['weight']}.")
        return copy

    def _quantize(self, linear: torch.nn.Linear, name: str, weights: Weights, copy: Quantized) -> None:
        fmt = create_format(weights.format, group_size=weights.group_size, device=torch.device("cpu"))  # plain torch
        weight_NK = linear.weight.data.to(self._stored_dtype)
        if (reason := fmt.unsupported(*weight_NK.shape, weight_NK.dtype)) is not None:
            copy.kept[name] = reason
            return
        packed = fmt.allocate(*weight_NK.shape, weight_NK.dtype, weight_NK.device)
        fmt.refresh_(packed, weight_NK)
        copy.weights[name] = fmt.dequantize(packed).to(linear.weight.dtype)
        copy.nbytes += packed.nbytes

    @torch.inference_mode()
    def outcomes(
        self,
        text: Sequence[int],
        first: int,
        temperature: float,
        gamma: int,
        copy: Quantized,
        int4_head: Quantized | None,
        drafters: Sequence[Drafter],
    ) -> dict[Drafter, Outcome]:
        """What each drafter would have proposed for ``text[first:]``, the response; all have the weights of ``copy``, and
        ``int4_head`` unless they share the policy's."""
        tokens = torch.tensor([list(text)], device=self.head.weight.device)
        with chained_attention(self.model):
            policy = PolicyPass()
            hidden_TH = self.backbone(tokens[:, :-1], chain=policy, use_cache=False).last_hidden_state[0, first:]
            positions = torch.arange(first, tokens.shape[1] - 1, device=tokens.device)[None]
            options = {"position_ids": positions, "use_cache": False}

            def drafts(chain: DraftPass) -> torch.Tensor:
                draft = {**options, "chain": chain}
                return functional_call(self.backbone, copy.weights, (tokens[:, first:-1],), draft).last_hidden_state[0]

            windows = dict.fromkeys((drafter.window_by, drafter.attention_window) for drafter in drafters)
            if any(rule == "attention" for rule, _ in windows):
                listening = Listening(policy, first)
                drafts(listening)
            drafted = {}
            for rule, size in windows:
                reads = Recent(size) if rule == "recency" else Chosen(size, listening.scores, first)
                chain = DraftPass(policy, first, reads)
                drafted[rule, size] = torch.stack([drafts(chain) for _ in range(gamma)])
        next_T = tokens[0, first + 1 :]
        found = {drafter: ([], []) for drafter in drafters}
        # How joint (see Sampler) stands in the last chains of a chunk, which go on in the next one's first column.
        last = {drafter: torch.ones(gamma, 1, device=tokens.device) for drafter in drafters}
        for begin in range(0, len(next_T), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            p_TV = distribution(self.head(hidden_TH[chunk]), temperature)
            for drafter, (expected, ratio) in found.items():
                rows, joint_T = [], torch.ones(len(p_TV), device=tokens.device)
                for depth, h_TH in enumerate(drafted[drafter.window_by, drafter.attention_window][:, chunk]):
                    q_TV = distribution(self._logits(h_TH, drafter.head, int4_head), temperature)
                    *row, after_T = compare(p_TV, q_TV, next_T[chunk], joint_T)
                    rows.append(row)
                    joint_T = torch.cat([last[drafter][depth], after_T[:-1]])
                    last[drafter][depth] = after_T[-1]
                expected.append(torch.stack([row[0] for row in rows]))
                ratio.append(torch.stack([row[1] for row in rows]))
        return {
            drafter: Outcome(torch.cat(expected, 1).double().cpu(), torch.cat(ratio, 1).double().cpu())
            for drafter, (expected, ratio) in found.items()
        }

    def _logits(self, hidden_TH: torch.Tensor, head: str, int4_head: Quantized | None) -> torch.Tensor:
        if head == "policy":
            return self.head(hidden_TH)
        logits_TV = F.linear(hidden_TH, int4_head.weights["weight"], self.head.bias)
        if head == "int4_rescored":
            rescore_(logits_TV, hidden_TH, self.head.weight)
        return logits_TV


def distribution(logits_TV: torch.Tensor, temperature: float) -> torch.Tensor:
    """float32 [T, V]; temperature 0 is greedy: all mass on the first of the largest logits."""
    if temperature == 0:
        return F.one_hot(logits_TV.argmax(-1), logits_TV.shape[-1]).float()
    return (logits_TV.float() / temperature).softmax(-1)


def compare(
    p_TV: torch.Tensor, q_TV: torch.Tensor, token_T: torch.Tensor, joint_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a draft from q after others whose joint, in the words of Sampler, is ``joint_T``: the probability that it is
    accepted if they are, the same given that the emitted token is ``token_T``, and joint after that token. float32 [T]
    each. After none, joint is 1 and the first of them 1 - TV(p, q)."""
    p_T, q_T = (each.gather(1, token_T[:, None])[:, 0] for each in (p_TV, q_TV))
    expected_T = torch.minimum(joint_T[:, None] * p_TV, q_TV).sum(-1) / joint_T
    ratio_T = (q_T / (joint_T * p_T).clamp_min(LEAST_FLOAT)).clamp(max=1.0)
    return expected_T, ratio_T, (joint_T * p_T / q_T.clamp_min(LEAST_FLOAT)).clamp(LEAST_FLOAT, 1.0)
