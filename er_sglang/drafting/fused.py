"""Of a few rows, a decoder layer from behind its attention to the next layer's attention in one launch.

    o -> norm -> gate_up, activation -> down -> the next layer's norm -> qkv

Of decoder layers that are known to have nothing else there. The norm behind the attention has a twin that runs all of it, by what
the attention gives and the residual: the Linear before it passes x on, and so do all that come behind it, to the following
qkv. Of more rows each module does what it did. The first layer's qkv, and what the last one has behind its attention, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import LinearBase
from sglang.srt.models.llama import LlamaDecoderLayer
from sglang.srt.models.qwen2 import Qwen2DecoderLayer
from sglang.srt.models.qwen3 import Qwen3DecoderLayer
from torch import nn

from er_sglang.drafting.linear import DraftLinearMethod, GatedLinearMethod
from er_sglang.drafting.twins import with_forward
from er_sglang.quantize.base import Format, LayerNorms, LayerProducts

_LAYERS = (LlamaDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)

Norm = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""RMSNorm.forward_cuda with a residual."""


def fuse_layers(
    policy: nn.Module, methods: Mapping[nn.Module, DraftLinearMethod], twins: Mapping[nn.Module, nn.Module]
) -> dict[nn.Module, nn.Module]:
    """Twins, by the policy's, of the norms in fused layers, in place of those in ``twins``. The ``methods`` of the
    Linears there let x pass from now on.

    Allocates scratch: call it outside the region whose memory sleep gives back.
    """
    fused: dict[nn.Module, nn.Module] = {}
    for layer, following in _consecutive(policy):
        linears = _linears(layer, following)
        first, second = norms = (layer.post_attention_layernorm, following.input_layernorm)
        if not (_multiplies(linears, methods) and _norms(norms, twins)):
            continue
        products = LayerProducts(*(methods[linear].packed for linear in linears))
        fmt = methods[linears[0]].fmt
        if not (rows := fmt.fused_rows(products)):
            continue
        for linear in linears[:4]:
            methods[linear].passes_rows = rows
        run = FusedNorm(twins[first]._forward_method, rows, fmt, products, norms, linears[3])
        fused[first] = with_forward(first, run)
        fused[second] = with_forward(second, PassingNorm(twins[second]._forward_method, rows))
    return fused


class _ReplacedNorm:
    """Forward of a norm that up to ``rows`` rows have in a fused layer. alone: what it computes of more."""

    def __init__(self, alone: Norm, rows: int) -> None:
        self._alone = alone
        self._rows = rows

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        post_residual_addition: torch.Tensor | None = None,
        quant_linear: nn.Module | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As RMSNorm.forward_cuda. quant_linear: see `twins`."""
        if 1 <= len(x) <= self._rows:
            return self._fused(x, residual, post_residual_addition)
        return self._alone(x, residual, post_residual_addition)

    def _fused(
        self, x: torch.Tensor, residual: torch.Tensor, addition: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class FusedNorm(_ReplacedNorm):
    """Of the norm behind an attention: all up to the following qkv."""

    def __init__(
        self,
        alone: Norm,
        rows: int,
        fmt: Format,
        products: LayerProducts,
        norms: tuple[RMSNorm, RMSNorm],
        qkv: LinearBase,
    ) -> None:
        super().__init__(alone, rows)
        self._fmt = fmt
        self._products = products
        self._norms = norms
        self._qkv = qkv

    def _fused(self, x, residual, addition):
        """``x`` [M, K] is the attention's output; qkv is returned for it."""
        if addition is not None:
            residual = residual + addition
        first, second = self._norms
        norms = LayerNorms(first.weight, second.weight, first.variance_epsilon)
        return self._fmt.apply_layer(self._products, x, residual, norms, self._qkv.bias), residual


class PassingNorm(_ReplacedNorm):
    """Of the norm in a fused layer's midst: it has been computed."""

    def _fused(self, x, residual, addition):
        if addition is not None:  # of the tokens of an image, never of a decode
            raise NotImplementedError("what is added to the residual between layers comes too late for a fused layer")
        return x, residual


def _consecutive(policy: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Decoder layers, each with the one behind it."""
    for modules in policy.modules():
        if isinstance(modules, nn.ModuleList):
            for layer, following in pairwise(modules):
                if type(layer) in _LAYERS and type(following) in _LAYERS:
                    yield layer, following


def _linears(layer: nn.Module, following: nn.Module) -> tuple[LinearBase, ...]:
    """As in LayerProducts."""
    return (
        layer.self_attn.o_proj,
        layer.mlp.gate_up_proj,
        layer.mlp.down_proj,
        following.self_attn.qkv_proj,
        following.self_attn.o_proj,
        following.mlp.gate_up_proj,
    )


def _multiplies(linears: tuple[LinearBase, ...], methods: Mapping[nn.Module, DraftLinearMethod]) -> bool:
    """Whether these have no more to do than a fused layer does."""
    o, gate_up, down, qkv, _, next_gate_up = linears
    return (
        all(linear in methods for linear in linears)
        and all(isinstance(methods[linear], GatedLinearMethod) for linear in (gate_up, next_gate_up))
        and all(linear.output_size_per_partition == linear.output_size for linear in (gate_up, qkv))
        and all(linear.input_size_per_partition == linear.input_size for linear in (o, down))
        and not any(linear.skip_bias_add for linear in (o, gate_up, down, qkv))
        and all(linear.bias is None for linear in (o, gate_up, down))
    )


def _norms(norms: tuple[RMSNorm, RMSNorm], twins: Mapping[nn.Module, nn.Module]) -> bool:
    first, second = norms
    return first in twins and second in twins and first.variance_epsilon == second.variance_epsilon
