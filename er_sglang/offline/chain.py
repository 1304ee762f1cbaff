"""The draft chain of a server, in transformers, started at every position of a text at once.

A server's drafter has no KV cache of its own. A chain that starts at position s (of the last emitted token) attends to
the policy's keys and values before s, and from s on to those it computed itself. Depth d of that chain runs at position
s + d. Here one forward pass per depth runs all chains: the query at position t belongs to the chain that starts at
t - d, and attends to

    the policy's K/V at positions below t - d, or those of them that a window keeps
    the K/V of depths 0 to d at positions t - d to t, one each

The text stands for the drafted tokens: it is what would have been drafted and accepted (see estimate.py).

    with chained_attention(model):
        policy = PolicyPass()
        hidden_SH = model.base_model(text, chain=policy)
        chain = DraftPass(policy, first, Recent(256))
        hidden_TH = drafter(text[first:], positions from first, chain=chain)     # depth 0, then 1, ...

Axes: S tokens of a text, T of them from `first` on, H heads, G heads with keys, D head size, C keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from er_sglang.config import FIRST_TOKENS, LAST_TOKENS, SINK_TOKENS
from er_sglang.drafting.attention_scores import asked

ATTENTION = "er_sglang_chain"
BLOCK = 256  # queries scored at a time: H * BLOCK * S scores are in memory
LAG = 2  # from the draft that chooses to the next chain's start, if all drafts were accepted; else it is 1


class PolicyPass:
    """Causal attention over a text, whose keys and values are kept, [G, S, D] for each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(self, layer: int, q_HSD, k_GSD, v_GSD, scaling: float) -> torch.Tensor:
        self.layers.append((k_GSD, v_GSD))
        repeats = len(q_HSD) // len(k_GSD)
        k_HSD, v_HSD = k_GSD.repeat_interleave(repeats, 0), v_GSD.repeat_interleave(repeats, 0)
        return F.scaled_dot_product_attention(q_HSD[None], k_HSD[None], v_HSD[None], is_causal=True, scale=scaling)[0]


class DraftPass:
    """Attention of all chains at one depth; the depth is one more at every forward pass that uses it."""

    def __init__(self, policy: PolicyPass, first: int, reads: Recent | Chosen) -> None:
        """first: position of the first query. reads: which of the policy's positions."""
        self._policy = policy.layers
        self._first = first
        self._reads = reads
        self._own: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in policy.layers]

    def attend(self, layer: int, q_HTD, k_GTD, v_GTD, scaling: float) -> torch.Tensor:
        own = self._own[layer]
        own.append((k_GTD, v_GTD))
        depth = len(own) - 1
        # Row t of depth m's keys belongs to position t; the query at t needs the one at t - (depth - m). The first
        # `depth` rows belong to chains that would have started before the text did: nobody reads what they become.
        aligned = [[x.roll(depth - m, dims=1) for x in pair] for m, pair in enumerate(own)]
        q_GRTD = (q_HTD * scaling).unflatten(0, (len(k_GTD), -1))
        own_scores_GRTN = torch.stack([(q_GRTD * k[:, None]).sum(-1) for k, _ in aligned], dim=-1)
        policy_k, policy_v = self._policy[layer]
        out_GRTD = torch.empty_like(q_GRTD)
        for begin in range(0, q_HTD.shape[1], BLOCK):
            block = slice(begin, begin + BLOCK)
            q = q_GRTD[:, :, block]
            starts_T = torch.arange(begin, begin + q.shape[2], device=q.device) + (self._first - depth)
            positions_C = self._reads.positions(int(starts_T[0]), int(starts_T[-1]), q.device)
            mask_TC = self._reads.mask(positions_C, starts_T)
            k, v = policy_k[:, None, positions_C], policy_v[:, None, positions_C]
            scores = (q @ k.mT).masked_fill(~mask_TC, -torch.inf)
            scores = torch.cat([scores, own_scores_GRTN[:, :, block]], dim=-1)
            weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            out = weights[..., : len(positions_C)] @ v
            for m, (_, own_v) in enumerate(aligned):
                out += weights[..., len(positions_C) + m, None] * own_v[:, None, block]
            out_GRTD[:, :, block] = out
        return out_GRTD.flatten(0, 1)


class Recent:
    """A window by recency, in tokens, 0 for all: AttentionWindow's rule, for pages of one token."""

    def __init__(self, size: int) -> None:
        self._size = size

    def mask(self, positions_C: torch.Tensor, starts_T: torch.Tensor) -> torch.Tensor:
        """Which positions of the policy's K/V the chains that start there attend to, bool [T, C]."""
        seen_TC = positions_C < starts_T[:, None]
        if self._size:
            seen_TC &= (positions_C < SINK_TOKENS) | (positions_C >= starts_T[:, None] - self._size)
        return seen_TC

    def positions(self, first_start: int, last_start: int, device: torch.device) -> torch.Tensor:
        """All positions that any chain with a start in between attends to, ascending."""
        end = max(last_start, 0)
        recent = max(SINK_TOKENS, first_start - self._size) if self._size else 0
        if recent <= SINK_TOKENS:
            return torch.arange(end, device=device)
        return torch.cat([torch.arange(SINK_TOKENS, device=device), torch.arange(recent, end, device=device)])


class Chosen:
    """A window by attention: the choice is that of the draft at LAG tokens before a chain's start; chains that start earlier
    see their last tokens instead."""

    def __init__(self, size: int, scores_TS: torch.Tensor, first: int) -> None:
        """scores: of Listening, for positions from ``first`` on."""
        count, context = scores_TS.shape
        position_S = torch.arange(context, device=scores_TS.device)
        starts_T1 = first + torch.arange(count, device=scores_TS.device)[:, None]
        last_T1 = starts_T1 - LAST_TOKENS
        knows_T1 = (starts_T1 - LAG >= first) & (last_T1 >= FIRST_TOKENS + size)
        scores_TS = scores_TS.roll(LAG, 0).masked_fill((position_S < FIRST_TOKENS) | (position_S >= last_T1), -1.0)
        best_TK = scores_TS.topk(min(size, context), dim=1).indices
        chosen_TS = torch.zeros_like(scores_TS, dtype=torch.bool).scatter_(1, best_TK, True)
        chosen_TS = torch.where(knows_T1, chosen_TS, position_S >= last_T1 - size)
        ends_TS = (position_S < FIRST_TOKENS) | (position_S >= last_T1)
        self._seen_TS = (chosen_TS | ends_TS) & (position_S < starts_T1)
        self._first = first

    def mask(self, positions_C: torch.Tensor, starts_T: torch.Tensor) -> torch.Tensor:
        """As Recent's."""
        return self._seen_TS[(starts_T - self._first).clamp(min=0)][:, positions_C]

    def positions(self, first_start: int, last_start: int, device: torch.device) -> torch.Tensor:
        return torch.arange(max(last_start, 0), device=device)


class Listening(DraftPass):
    """First drafts that read everything. ``scores``: how much each attends to each position before it, float32 [T, S], as
    a server asks (attention_scores.py)."""

    def __init__(self, policy: PolicyPass, first: int) -> None:
        super().__init__(policy, first, Recent(0))
        self._asked = asked(range(len(policy.layers)))
        self.scores: torch.Tensor | float = 0.0

    def attend(self, layer: int, q_HTD, k_GTD, v_GTD, scaling: float) -> torch.Tensor:
        if layer in self._asked:
            policy_k_GSD, _ = self._policy[layer]
            q_GRTD = (q_HTD * scaling).unflatten(0, (len(k_GTD), -1))
            position_S = torch.arange(policy_k_GSD.shape[1], device=q_HTD.device)
            blocks = []
            for begin in range(0, q_HTD.shape[1], BLOCK):
                scores = (q_GRTD[:, :, begin : begin + BLOCK] @ policy_k_GSD[:, None].mT).float()
                starts_T = self._first + begin + torch.arange(scores.shape[2], device=q_HTD.device)
                weights = scores.masked_fill(position_S >= starts_T[:, None], -torch.inf).softmax(-1)
                blocks.append(weights.mean((0, 1)))
            self.scores = self.scores + torch.cat(blocks) / len(self._asked)
        return super().attend(layer, q_HTD, k_GTD, v_GTD, scaling)


def _attention(module, query, key, value, attention_mask, *, scaling, chain, **_) -> tuple[torch.Tensor, None]:
    out_HTD = chain.attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return out_HTD.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)


@contextmanager
def chained_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, forward passes of the model take a ``chain``, a PolicyPass or a DraftPass, and one text."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
