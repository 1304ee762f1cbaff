"""SGLang plugin for tests: on a CPU too a drafter has its small twins and its attention, with plain torch for their kernels.

Prints the name of each kernel when it is called first.
"""

from __future__ import annotations

import torch

from er_sglang.drafting import attention, early, twins
from er_sglang.quantize.blocks import FUSED_ROWS
from er_sglang.quantize.reference import ReferenceInt4

KERNELS = ("rms_norm", "add_rms_norm_", "silu_and_mul", "rope_store_")


def activate() -> None:
    twins.is_hopper = lambda device: True
    early.load = lambda dtype: None
    early.DTYPES = (torch.float32,)
    early.HEAD_DIMS = range(1024)
    twins._computes = lambda module, cls: isinstance(module, cls)
    for name in KERNELS:
        setattr(early, name, _announced(name, globals()[f"_{name}"]))
    ReferenceInt4.apply_gated = _announced("apply_gated", ReferenceInt4.apply_gated)
    ReferenceInt4.fused_rows = lambda fmt, products: FUSED_ROWS
    ReferenceInt4.apply_layer = _announced("apply_layer", _apply_layer)
    attention.is_hopper = lambda device: True
    attention.DTYPES = (torch.float32,)
    attention.HEAD_DIMS = range(1024)
    attention.MAX_REQUESTS = 1 << 20
    attention.attend = _announced("attend", _attend)
    attention.resident_blocks = lambda device: 1


def _announced(name: str, function):
    announced = False

    def call(*args):
        nonlocal announced
        if not announced:
            print(f"TWIN_CALL {name}", flush=True)
        announced = True
        return function(*args)

    return call


def _rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _add_rms_norm_(x, residual, weight, eps):
    residual += x
    x.copy_(_rms_norm(residual, weight, eps))


def _apply_layer(fmt, products, x, residual, norms, bias):
    assert len(x) <= FUSED_ROWS
    x = fmt.apply(products.o, x, None)
    _add_rms_norm_(x, residual, norms.first_H, norms.eps)
    x = fmt.apply(products.down, fmt.apply_gated(products.gate_up, x, None), None)
    _add_rms_norm_(x, residual, norms.second_H, norms.eps)
    return fmt.apply(products.qkv, x, bias)


def _silu_and_mul(x):
    gate, up = x.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up


def _rope_store_(q, k, v, k_cache, v_cache, cos_sin, positions, slots, norms):
    if norms:
        q, k = _rms_norm(q, norms.q_weight_D, norms.eps), _rms_norm(k, norms.k_weight_D, norms.eps)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=2)

    def rotated(part):
        x, y = part.chunk(2, dim=2)
        return torch.cat([x * cos - y * sin, x * sin + y * cos], dim=2)

    k_cache[slots], v_cache[slots] = rotated(k), v
    return rotated(q)


def _attend(q, k_cache, v_cache, req_to_token, rows, lengths, parts, arrivals, scale):
    out = torch.empty_like(q)
    group = q.shape[1] // k_cache.shape[1]
    for b, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist())):
        slots = req_to_token[row, :length].long()
        k, v = (cache[slots].repeat_interleave(group, dim=1) for cache in (k_cache, v_cache))
        weights = torch.softmax(scale * torch.einsum("hd,thd->ht", q[b], k), dim=1)
        out[b] = torch.einsum("ht,thd->hd", weights, v)
    return out
