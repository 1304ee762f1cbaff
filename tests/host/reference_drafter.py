"""What a drafter proposes, from transformers in float32: the quantized weights, on parts of the policy's KV cache."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache

from er_sglang.drafting.attention_scores import asked
from er_sglang.drafting.rescoring import rescore_reference_
from er_sglang.quantize import rtn

ATTENTION = "reference_drafter"


def _attend(module, query, key, value, mask, *, scaling, **_) -> tuple[torch.Tensor, None]:
    """One query over all keys; it is kept."""
    module.latest_query_HD = query[0, :, 0]
    repeats = query.shape[1] // key.shape[1]
    weights = (scaling * query @ key.repeat_interleave(repeats, 1).mT).softmax(-1)
    return (weights @ value.repeat_interleave(repeats, 1)).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)


class ReferenceDrafter:
    """int4 in groups of 128. head: of lm_head, "int4", "int4_rescored" or the "policy"'s."""

    def __init__(self, policy: Path, head: str = "int4_rescored") -> None:
        self._policy = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        self._model = model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()
        model.set_attn_implementation(ATTENTION)
        for name, linear in model.named_modules():
            if isinstance(linear, torch.nn.Linear) and (name != "lm_head" or head != "policy"):
                packed = rtn.quantize_int4(linear.weight.data, group_size=128, symmetric=True)
                linear.weight = torch.nn.Parameter(
                    rtn.dequantize_int4(*packed).float()
                )  # a tied embedding keeps the old one
        self._rescored = head == "int4_rescored"

    @torch.inference_mode()
    def cache(self, sequence: list[int]) -> DynamicCache:
        """The policy's."""
        return self._policy(torch.tensor([sequence]), use_cache=True).past_key_values

    @torch.inference_mode()
    def drafts(
        self, token: int, length: int, cache: DynamicCache, seen: list[int], gamma: int = 1
    ) -> tuple[list[int], list[dict[int, torch.Tensor]]]:
        """A greedy chain after ``token``, at position ``length``, that reads the positions ``seen``; and the queries of each
        draft, [H, D] by layer."""
        cut, drafted, queries = DynamicCache(), [], []
        for index, layer in enumerate(cache.layers):
            cut.update(layer.keys[:, :, seen], layer.values[:, :, seen], index)
        for i in range(gamma):
            position_ids = torch.tensor([[length + i]])
            hidden_1H = self._model.model(torch.tensor([[token]]), past_key_values=cut, position_ids=position_ids)[0][0]
            logits_1V = self._model.lm_head(hidden_1H)
            if self._rescored:
                rescore_reference_(logits_1V, hidden_1H, self._policy.lm_head.weight.data)
            token = int(logits_1V.argmax())
            drafted.append(token)
            queries.append({i: layer.self_attn.latest_query_HD for i, layer in enumerate(self._model.model.layers)})
        return drafted, queries

    @torch.inference_mode()
    def attended(self, queries: dict[int, torch.Tensor], length: int, cache: DynamicCache) -> torch.Tensor:
        """How much a draft attends to each position before ``length``, as the mean of the layers that are asked and of
        their heads."""
        found = []
        for index in asked(sorted(queries)):
            keys_GSD = cache.layers[index].keys[0, :, :length]
            keys_HSD = keys_GSD.repeat_interleave(len(queries[index]) // len(keys_GSD), 0)
            scores_HS = (
                self._model.model.layers[index].self_attn.scaling * (keys_HSD @ queries[index][..., None])[..., 0]
            )
            found.append(scores_HS.softmax(-1).mean(0))
        return torch.stack(found).mean(0)
