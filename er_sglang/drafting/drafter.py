"""The drafter: a shadow of the live policy, its Linear layers and lm_head quantized, all else the same objects.

Every module that contains a converted Linear is shallow-copied; every other module (embedding, norms, rotary,
RadixAttention, logits processor) is shared, but for `twins` of the small ones on Hopper. Tensor-parallel shards, fused
qkv and gate/up projections and biases follow by construction, and the drafter's attention layers, being the policy's
own, read and write the policy's KV cache. lm_head is converted where the logits are computed and nowhere else: one that
is tied to the embedding embeds as the policy's. Of an fp8 policy the copy is made from codes times scales, block by
block, and a layer that is not converted is the policy's own, fp8 products included.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager

from sglang.srt.layers.linear import LinearBase
from sglang.srt.utils import use_intel_amx_backend
from torch import nn
from tqdm import tqdm

from er_sglang.drafting.fused import fuse_layers
from er_sglang.drafting.linear import DraftLinearMethod, GatedLinearMethod, RescoredHeadMethod
from er_sglang.drafting.policy_weight import policy_weight, unreadable
from er_sglang.drafting.shadow import shadow, shallow_copy
from er_sglang.drafting.twins import Activated, gated_activations, leave_head_norms_to_attention, small_twins
from er_sglang.errors import ConfigError
from er_sglang.quantize import Format

logger = logging.getLogger(__name__)


class Drafter:
    """Quantized copy of ``policy`` that is refreshed in place from its live weights.

    model: the shadow module tree, called like the policy's.
    nbytes: memory the packed weights hold.
    """

    def __init__(
        self,
        policy: nn.Module,
        fmt: Format,
        head_fmt: Format | None,
        rescored: bool,
        weights_region: AbstractContextManager,
        progress: bool,
    ) -> None:
        """Build and fill the shadow; raises ConfigError if no layer can be converted.

        head_fmt: format of lm_head; None shares the policy's. rescored: its leading tokens are scored again.
        weights_region: memory region for the packed weights, so that sleep releases them with the policy's.
        progress: show a progress bar.
        """
        self._progress = progress
        self._methods: dict[nn.Module, DraftLinearMethod] = {}  # by the policy's layer
        kept: dict[str, str] = {}

        def convert(
            name: str, layer: nn.Module, fmt: Format, method: type[DraftLinearMethod]
        ) -> DraftLinearMethod | None:
            if (reason := _unconvertible(layer, fmt)) is None:
                return method(fmt, layer)
            kept[name] = reason

        activations, head = gated_activations(policy), None
        with weights_region:
            for name, layer in policy.named_modules():
                if isinstance(layer, LinearBase):
                    gated = layer in activations and fmt.gates(layer.output_size_per_partition)
                    if method := convert(name, layer, fmt, GatedLinearMethod if gated else DraftLinearMethod):
                        self._methods[layer] = method
            if not self._methods:
                raise ConfigError(f"no Linear layer of this model can be converted: {sorted(set(kept.values()))}.")
            if head_fmt is not None:
                head = convert(
                    "lm_head", policy.lm_head, head_fmt, RescoredHeadMethod if rescored else DraftLinearMethod
                )
        small = small_twins(policy)
        for layer, activation in activations.items():
            if isinstance(self._methods.get(layer), GatedLinearMethod):
                small[activation] = Activated()
        small |= (fused := fuse_layers(policy, self._methods, small))
        self.model = shadow(policy, lambda module: small.get(module, self._linear_twin(module)))
        leave_head_norms_to_attention(self.model)
        if head is not None:  # which may be the embedding, too, and that stays the policy's
            self._methods[policy.lm_head] = head
            self.model.lm_head = _head_twin(policy.lm_head, head)
        if kept:
            logger.warning("SELF_QUANT drafts with %d of the policy's own layers: %s", len(kept), kept)
        if fused:  # two norms each
            logger.info("Decoder layers fused for a few requests: %d.", len(fused) // 2)
        self.refresh_()

    @property
    def nbytes(self) -> int:
        return sum(method.packed.nbytes for method in self._methods.values())

    def refresh_(self) -> None:
        """Re-quantize every layer from the policy's live weights, in place; launches work, does not wait for it."""
        layers = tqdm(self._methods.items(), desc="Quantizing the drafter", unit="layer", disable=not self._progress)
        self._progress = False
        for layer, method in layers:
            method.refresh_(layer)

    def _linear_twin(self, module: nn.Module) -> nn.Module | None:
        if (method := self._methods.get(module)) is None:
            return None
        twin = shallow_copy(module)
        twin._parameters = {name: value for name, value in twin._parameters.items() if name == "bias"}
        twin.quant_method = method
        return twin


def _unconvertible(layer: nn.Module, fmt: Format) -> str | None:
    """Why ``layer`` must stay as it is, or None."""
    if (reason := unreadable(layer)) is not None:
        return reason
    if use_intel_amx_backend(layer):
        raise ConfigError(
            "The CPU build of sgl-kernel packed the policy's weights for AMX: install the PyPI build instead."
        )
    weight_NK = policy_weight(layer)
    return fmt.unsupported(*weight_NK.shape, weight_NK.dtype)


def _head_twin(head: nn.Module, method: DraftLinearMethod) -> nn.Module:
    """``head`` as LogitsProcessor reads it: a quant_method goes before the weight, but only if there is a weight."""
    twin = shallow_copy(head)
    twin.quant_method = method
    return twin
