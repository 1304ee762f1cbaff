"""What should a draft read of a long context? Windows by recency against tokens that were attended to.

    python launch/results/2026-11-26-acceptance/reading.py CHECKPOINT > reading.txt

Figures as in variants.py, on its policy's answers to questions about documents of 1500 tokens. A choice of N tokens is
4 first ones, 60 last ones and N - 64 others, or pages of them: those with the largest attention weight at the latest
token that is known when the choice is made.
"""

import sys

import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer
from variants import Lab, int4

from er_sglang.offline import texts
from er_sglang.offline.chain import DraftPass, PolicyPass, chained_attention
from er_sglang.offline.drafters import Policy, distribution

CONTEXT, NEW_TOKENS, EARLIER = 1500, 64, 64
FIRST, LAST = 4, 60


class Watched(PolicyPass):
    """weights: of each layer, of the mean query head of each key head, [G, T, S], from ``begin`` on."""

    def __init__(self, begin: int, keys=None) -> None:
        super().__init__()
        self.begin, self.keys, self.weights = begin, keys, []

    def attend(self, layer, q_HSD, k_GSD, v_GSD, scaling):
        k = self.keys[layer][0] if self.keys else k_GSD
        scores = (q_HSD[:, self.begin :] * scaling).unflatten(0, (len(k), -1)) @ k[:, None].mT
        position = torch.arange(k.shape[1])
        scores = scores.float().masked_fill(position > position[self.begin :, None], -torch.inf)
        self.weights.append(scores.softmax(-1).mean(1).half())
        return super().attend(layer, q_HSD, k_GSD, v_GSD, scaling)


class GivenPass(DraftPass):
    """First drafts alone. reads: a mask of each layer, [1 or G, T, S]."""

    def attend(self, layer, q_HTD, k_GTD, v_GTD, scaling):
        q_GRTD = (q_HTD * scaling).unflatten(0, (len(k_GTD), -1))
        policy_k, policy_v = self._policy[layer]
        scores = (q_GRTD @ policy_k[:, None].mT).masked_fill(~self._reads[layer][:, None], -torch.inf)
        own = (q_GRTD * k_GTD[:, None]).sum(-1, keepdim=True)
        weights = torch.cat([scores, own], -1).softmax(-1, dtype=torch.float32).to(q_HTD.dtype)
        return (weights[..., :-1] @ policy_v[:, None] + weights[..., -1:] * v_GTD[:, None]).flatten(0, 1)


class Reading(Lab):
    def __init__(self, checkpoint: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
        self.policy = Policy(self.model, torch.bfloat16)
        self.head_VH = self.policy.head.weight.data
        self.layers = self.model.config.num_hidden_layers
        self.copy = {
            f"{name}.weight": int4(module.weight.data)
            for name, module in self.policy.backbone.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        prompts = [texts.encode(tokenizer, prompt, False) for prompt in texts.long_prompts(tokenizer, CONTEXT)]
        responses = texts.respond(
            self.model, prompts, temperature=1.0, new_tokens=NEW_TOKENS, batch=12, seed=0, ignore_eos=False
        )
        self.texts, self.base = [], None
        with torch.inference_mode(), chained_attention(self.model):
            for response in responses:
                tokens, begin = torch.tensor([response.tokens]), response.first - EARLIER
                by_policy = Watched(begin)
                hidden = self.policy.backbone(tokens[:, :-1], chain=by_policy, use_cache=False).last_hidden_state
                p_TV = distribution(self.policy.head(hidden[0, response.first :]), 1.0)
                by_draft = Watched(begin, by_policy.layers)
                options = {"chain": by_draft, "use_cache": False}
                functional_call(self.policy.backbone, self.copy, (tokens[:, :-1],), options)
                self.texts.append((tokens, response.first, (by_policy, by_draft), p_TV))

    @torch.inference_mode()
    def try_(self, name: str, masks) -> None:
        """masks: of (first, T, S, the two Watched), of each layer."""
        found = []
        with chained_attention(self.model):
            for tokens, first, watched, _ in self.texts:
                size = tokens.shape[1] - 1
                chain = GivenPass(watched[0], first, masks(first, size - first, size, watched))
                options = {"position_ids": torch.arange(first, size)[None], "use_cache": False, "chain": chain}
                output = functional_call(self.policy.backbone, self.copy, (tokens[:, first:-1],), options)
                found.append(output.last_hidden_state[0])
        self.show(name, found)

    def recent(self, first: int, recent: int):
        def masks(begin, count, size, _):
            position, start = torch.arange(size), begin + torch.arange(count)[:, None]
            seen = (position < start) & ((position < first) | (position >= start - recent))
            return [seen[None]] * self.layers

        return masks

    def chosen(self, budget, page=1, share="all", every=1, asked=None, by_draft=False, queries=1, ahead=0):
        """share: whose weights decide, of each key "head", of the "layer", or of "all" layers (those ``asked``). every:
        tokens between two choices. queries: the mean of the last ones. ahead: neighbours that follow count as well."""

        def masks(begin, count, size, watched):
            weights = [each.float() for each in watched[by_draft].weights]
            if share != "head":
                weights = [each.mean(0, keepdim=True) for each in weights]
            if share == "all":
                weights = [torch.stack([weights[layer] for layer in asked or range(self.layers)]).mean(0)]
            position, start = torch.arange(size), begin + torch.arange(count)[:, None]
            latest = EARLIER + torch.arange(count) // every * every - 1  # row of the last token that is known
            ends = (position < FIRST) | (position >= start - LAST)
            found = []
            for each in weights:
                row = torch.stack([each[:, latest - back] for back in range(queries)]).mean(0)
                row = F.max_pool1d(F.pad(row, (ahead, 0)), ahead + 1, 1)
                row = row.masked_fill(ends | (position >= start), 0.0)
                pages = F.pad(row, (0, -size % page)).unflatten(-1, (-1, page)).amax(-1)
                best = pages.topk((budget - FIRST - LAST) // page, -1).indices
                kept = torch.zeros_like(pages, dtype=torch.bool).scatter_(-1, best, True)
                found.append((kept.repeat_interleave(page, -1)[..., :size] | ends) & (position < start))
            return found * (self.layers if share == "all" else 1)

        return masks


def main(checkpoint: str) -> None:
    lab = Reading(checkpoint)
    lab.try_("all", lab.recent(0, 1 << 30))
    for first, recent in ((4, 316), (64, 256), (64, 512), (64, 1024)):
        lab.try_(f"by recency: {first} first, {recent} last", lab.recent(first, recent))
    for budget in (128, 320, 576):
        for share in ("head", "layer", "all"):
            for page in (1, 16, 64):
                name = f"{budget}, pages of {page}, by {share}"
                lab.try_(name, lab.chosen(budget, page, share))
    quarters = [range(i * lab.layers // 4, (i + 1) * lab.layers // 4) for i in range(4)]
    for i, quarter in enumerate(quarters, 1):
        lab.try_(f"128, by quarter {i} of the layers", lab.chosen(128, asked=quarter))
    third = quarters[2]
    for layers in (4, 2):
        asked = third[:: -(-len(third) // layers)]
        lab.try_(f"128, by {len(asked)} layers of the third quarter", lab.chosen(128, asked=asked))
    few = third[:: -(-len(third) // 4)]
    lab.try_("128, by these 3, a draft's queries", lab.chosen(128, asked=few, by_draft=True))
    for queries in (4, 16):
        lab.try_(f"128, the mean of {queries} queries", lab.chosen(128, queries=queries))
    for budget in (192, 320, 576, 1088):
        for every in (4, 8, 16, 64):
            how = lab.chosen(budget, every=every, asked=few, by_draft=True)
            lab.try_(f"{budget}, every {every} tokens, by these 3, a draft's queries", how)
    for ahead in (2, 8):
        how = lab.chosen(320, every=8, asked=few, by_draft=True, ahead=ahead)
        lab.try_(f"320, every 8 tokens, and {ahead} neighbours after each", how)


if __name__ == "__main__":
    main(sys.argv[1])
