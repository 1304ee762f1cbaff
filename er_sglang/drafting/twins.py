"""Twins of a model's small modules, on Hopper: the same functions, by kernels that let the next one start early.

Norms and activations are exchanged one by one; an activation that an int4 product computes is left out, and of a few rows
norms are part of a fused layer (fused.py). Rotation, and Qwen3's norms of heads, move into the attention: a rotary
embedding's twin hands q and k on as they are, and the attention's twin rotates them on their way into the KV cache, one
kernel instead of three or four.
"""

from __future__ import annotations

import types

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_token_to_kv_pool
from sglang.srt.models.qwen3 import Qwen3Attention
from sglang.srt.models.utils import apply_qk_norm
from torch import nn

from er_sglang.drafting import early
from er_sglang.drafting.attention import is_plain
from er_sglang.drafting.shadow import shallow_copy
from er_sglang.host.releases import adapter
from er_sglang.quantize.hopper import is_hopper

_dispatch = adapter("dispatch")


def small_twins(policy: nn.Module) -> dict[nn.Module, nn.Module]:
    """Twins by the policy's module; none for modules that compute something else, and none on other chips."""
    weight = next(policy.parameters())
    if not is_hopper(weight.device):
        return {}
    twins: dict[nn.Module, nn.Module] = {}
    for module in policy.modules():
        if _has_norm_twin(module):
            twins[module] = with_forward(module, types.MethodType(_rms_norm, module))
        elif _computes(module, SiluAndMul):
            twins[module] = with_forward(module, early.silu_and_mul)
    rotating = [module for module in policy.modules() if "rotary_emb" in module._modules]
    if all(_computes_rotation(module) for module in rotating):
        for module in rotating:
            twins[module.rotary_emb] = Unrotated()
            norms = (module.q_norm, module.k_norm) if isinstance(module, Qwen3Attention) else None
            twins[module.attn] = RotatingAttention(module.attn, module.rotary_emb, norms)
    if twins:
        early.load(weight.dtype)
    return twins


def gated_activations(policy: nn.Module) -> dict[nn.Module, nn.Module]:
    """Of gated MLPs, the activation by the Linear before it, whose output is gate and up side by side."""
    return {
        mlp.gate_up_proj: mlp.act_fn
        for mlp in policy.modules()
        if {"gate_up_proj", "act_fn"} <= mlp._modules.keys() and type(mlp.act_fn) is SiluAndMul
    }


class Activated(nn.Module):
    """Stands for an activation that the product before it computes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def leave_head_norms_to_attention(shadow: nn.Module) -> None:
    """The attention's twin norms heads: Qwen3's attention block, which calls a function to do so, must not."""
    for module in shadow.modules():
        if isinstance(module, Qwen3Attention) and isinstance(module.rotary_emb, Unrotated):
            module.forward_prepare_native = types.MethodType(_project, module)


def _project(self: Qwen3Attention, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    qkv, _ = self.qkv_proj(hidden_states)
    return qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)


class Unrotated(nn.Module):
    """Stands for a rotary embedding whose attention rotates."""

    def forward(self, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q, k


class RotatingAttention(nn.Module):
    """The policy's attention of a decode step, behind its rotary embedding and, of Qwen3, its norms of heads.

    Another KV cache than the plain one in the model's dtype is written by SGLang, after SGLang's rotation.
    """

    def __init__(
        self, attention: RadixAttention, rotary: RotaryEmbedding, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> None:
        super().__init__()
        self._attention = attention
        self._rotary = rotary
        self._norms = norms

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward_batch: ForwardBatch, save_kv_cache: bool = True
    ) -> torch.Tensor:
        pool = get_token_to_kv_pool()
        if not is_plain(pool, k.dtype):
            if self._norms:
                q, k = apply_qk_norm(q, k, *self._norms, self._attention.head_dim)
            q, k = self._rotary(forward_batch.positions, q, k)
            return self._attention(q, k, v, forward_batch, save_kv_cache)
        layer = self._attention.layer_id - pool.start_layer
        norms = None
        if self._norms:
            q_norm, k_norm = self._norms
            norms = early.HeadNorms(q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
        q = early.rope_store_(
            *(part.view(len(part), -1, self._attention.head_dim) for part in (q, k, v)),
            pool.k_buffer[layer],
            pool.v_buffer[layer],
            self._rotary.cos_sin_cache,
            forward_batch.positions,
            forward_batch.out_cache_loc,
            norms,
        )
        return self._attention(q.flatten(1), k, v, forward_batch, save_kv_cache=False)


def _computes(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` computes what ``cls`` does on CUDA."""
    if not isinstance(module, cls):
        return False
    return getattr(_dispatch.forward_method(module), "__func__", None) is cls.forward_cuda


def _has_norm_twin(module: nn.Module) -> bool:
    return (
        _computes(module, RMSNorm)
        and module.variance_size_override is None
        and not module.cast_x_before_out_mul
        and not module.fp32_residual
        and module.weight.dtype in early.DTYPES
        and module.hidden_size % early.WIDTH == 0
        and module.hidden_size <= early.MAX_HIDDEN
    )


def _computes_rotation(module: nn.Module) -> bool:
    """Whether ``module`` attends to heads that are rotated whole, in halves, by a table in float32."""
    rotary, attention = module.rotary_emb, getattr(module, "attn", None)
    return (
        _computes(rotary, RotaryEmbedding)
        and not rotary.use_fallback_kernel
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size
        and rotary.head_size in early.HEAD_DIMS
        and rotary.cos_sin_cache.dtype == torch.float32
        and type(attention) is RadixAttention
        and attention.head_dim == attention.v_head_dim == rotary.head_size
        and (not isinstance(module, Qwen3Attention) or _has_norm_twin(module.q_norm) and _has_norm_twin(module.k_norm))
    )


def with_forward(module: nn.Module, forward) -> nn.Module:
    """A twin of a module of many platforms (MultiPlatformOp, BaseFusedOp) that computes ``forward``."""
    twin = shallow_copy(module)
    twin._forward_method = forward
    return twin


def _rms_norm(
    self: RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: nn.Module | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm.forward_cuda: in place with a residual, else not.

    quant_linear: the Linear behind it, given from 0.5.19 to 0.5.21, whose input SGLang may quantize here; it does so itself.
    """
    if residual is None:
        return early.rms_norm(x, self.weight, self.variance_epsilon)
    if post_residual_addition is not None:
        residual = residual + post_residual_addition
    early.add_rms_norm_(x, residual, self.weight, self.variance_epsilon)
    return x, residual
