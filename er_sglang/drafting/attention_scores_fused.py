"""Attention scores as kernels that read the keys twice: for the sums of the softmax, and for its weights.

What differs from step to step is not specialised on (`do_not_specialize`): else a server would compile, for most of a
second, in the middle of a rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

BLOCK = 64  # keys at a time
SPLIT = 256  # keys that a program of the first kernel sums over
LEAST_HEADS = 16  # of a key, padded: the least that tl.dot takes


def attention_scores_fused(
    queries_SBLHD: torch.Tensor,
    kept_B: torch.Tensor,
    keys: Sequence[torch.Tensor],
    req_to_token: torch.Tensor,
    rows_B: torch.Tensor,
    lengths_B: torch.Tensor,
    columns: int,
    scale: float,
) -> torch.Tensor:
    """As `attention_scores`; rows of keys are aligned to 16 bytes."""
    batch, (steps, _, layers, heads, head_dim) = len(kept_B), queries_SBLHD.shape
    groups = keys[0].shape[1]
    sharing = heads // groups
    padded_heads, padded_dim = max(LEAST_HEADS, triton.next_power_of_2(sharing)), triton.next_power_of_2(head_dim)
    splits = triton.cdiv(columns, SPLIT)
    pointers_L = _on_device(tuple(k_SGD.data_ptr() for k_SGD in keys), keys[0].device)
    sums = torch.empty((batch, layers * groups, splits, padded_heads), dtype=torch.float32, device=kept_B.device)
    log_sums = torch.empty((batch, layers * groups, padded_heads), dtype=torch.float32, device=kept_B.device)
    scores_BC = torch.empty((batch, columns), dtype=torch.float32, device=kept_B.device)
    shared = (queries_SBLHD, kept_B, keys[0], pointers_L, req_to_token, rows_B, lengths_B)
    sizes = (steps, *queries_SBLHD.stride()[:4], *keys[0].stride()[:2], req_to_token.stride(0))
    constants = {
        "GROUPS": groups,
        "SHARING": sharing,
        "HEADS": padded_heads,
        "D": head_dim,
        "PADDED_D": padded_dim,
        "BLOCK": BLOCK,
    }
    _sums_kernel[(batch, layers * groups, splits)](*shared, sums, *sizes, splits, scale, SPLIT=SPLIT, **constants)
    _log_sums_kernel[(batch * layers * groups,)](sums, log_sums, splits, HEADS=padded_heads)
    _scores_kernel[(batch, triton.cdiv(columns, BLOCK))](
        *shared, log_sums, scores_BC, *sizes, columns, scale, LAYERS=layers, **constants
    )
    return scores_BC


@lru_cache
def _on_device(pointers: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(pointers, device=device)


@triton.jit
def _queries(queries_ptr, kept_ptr, b, steps, step_stride, row_stride):
    """Those of a request."""
    return queries_ptr + (tl.minimum(tl.load(kept_ptr + b), steps) - 1) * step_stride + b * row_stride


@triton.jit
def _products(
    queries_ptr, like_ptr, pointers_ptr, slots, layer, group, here,
    layer_stride, head_stride, slot_stride, group_stride,
    SHARING: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """q k^T of the heads that share the keys of a group, [HEADS, BLOCK]; rows beyond SHARING are 0."""
    head, lane = tl.arange(0, HEADS), tl.arange(0, PADDED_D)
    q_ptr = queries_ptr + layer * layer_stride + group * SHARING * head_stride
    q_here = (head[:, None] < SHARING) & (lane[None, :] < D)
    q = tl.load(q_ptr + head[:, None] * head_stride + lane[None, :], mask=q_here, other=0.0)
    k_ptr = tl.load(pointers_ptr + layer).to(like_ptr.dtype) + group * group_stride
    k_ptrs = tl.multiple_of(k_ptr + slots[None, :] * slot_stride + lane[:, None], [16, 1])  # else two bytes a load
    k = tl.load(k_ptrs, mask=here[None, :] & (lane[:, None] < D), other=0.0)
    return tl.dot(q, k.to(q.dtype), input_precision="ieee")


@triton.jit(do_not_specialize=["steps", "splits"])
def _sums_kernel(
    queries_ptr, kept_ptr, like_ptr, pointers_ptr, table_ptr, rows_ptr, lengths_ptr, sums_ptr,
    steps, step_stride, row_stride, layer_stride, head_stride, slot_stride, group_stride, table_stride, splits, scale,
    SPLIT: tl.constexpr, GROUPS: tl.constexpr, SHARING: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (request, layer and group, split): the logarithm of the sum of exponents."""
    b, which, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + b)
    row_ptr = table_ptr + tl.load(rows_ptr + b) * table_stride
    q_ptr = _queries(queries_ptr, kept_ptr, b, steps, step_stride, row_stride)
    largest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    for begin in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length), BLOCK):
        column = begin + tl.arange(0, BLOCK)
        here = column < length
        slots = tl.load(row_ptr + column, mask=here, other=0).to(tl.int64)
        x = _products(
            q_ptr, like_ptr, pointers_ptr, slots, which // GROUPS, which % GROUPS, here,
            layer_stride, head_stride, slot_stride, group_stride, SHARING, HEADS, D, PADDED_D,
        )  # fmt: skip
        x = tl.where(here[None, :], x * scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, 1))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger[:, None]), 1)
        largest = larger
    out = ((b * tl.num_programs(1) + which) * splits + split) * HEADS + tl.arange(0, HEADS)
    tl.store(sums_ptr + out, largest + tl.log(total))


@triton.jit(do_not_specialize=["splits"])
def _log_sums_kernel(sums_ptr, log_sums_ptr, splits, HEADS: tl.constexpr):
    """Per (request, layer and group): over all splits, the first of which is never empty."""
    unit, head = tl.program_id(0), tl.arange(0, HEADS)
    largest = tl.load(sums_ptr + unit * splits * HEADS + head)
    total = tl.full((HEADS,), 1.0, tl.float32)
    for split in range(1, splits):
        x = tl.load(sums_ptr + (unit * splits + split) * HEADS + head)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    tl.store(log_sums_ptr + unit * HEADS + head, largest + tl.log(total))


@triton.jit(do_not_specialize=["steps", "columns"])
def _scores_kernel(
    queries_ptr, kept_ptr, like_ptr, pointers_ptr, table_ptr, rows_ptr, lengths_ptr, log_sums_ptr, scores_ptr,
    steps, step_stride, row_stride, layer_stride, head_stride, slot_stride, group_stride, table_stride, columns, scale,
    LAYERS: tl.constexpr, GROUPS: tl.constexpr, SHARING: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    PADDED_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (request, block of keys): the mean weight of each over all layers and heads."""
    b = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + b)
    here = column < length
    slots = tl.load(table_ptr + tl.load(rows_ptr + b) * table_stride + column, mask=here, other=0).to(tl.int64)
    q_ptr = _queries(queries_ptr, kept_ptr, b, steps, step_stride, row_stride)
    head = tl.arange(0, HEADS)
    score = tl.zeros((BLOCK,), tl.float32)
    if tl.program_id(1) * BLOCK < length:
        for which in range(LAYERS * GROUPS):
            x = _products(
                q_ptr, like_ptr, pointers_ptr, slots, which // GROUPS, which % GROUPS, here,
                layer_stride, head_stride, slot_stride, group_stride, SHARING, HEADS, D, PADDED_D,
            )  # fmt: skip
            log_sum = tl.load(log_sums_ptr + (b * LAYERS * GROUPS + which) * HEADS + head)
            weight = tl.exp(x * scale - log_sum[:, None])
            score += tl.sum(tl.where(head[:, None] < SHARING, weight, 0.0), 0)
    score = tl.where(here, score / (LAYERS * GROUPS * SHARING), 0.0)
    tl.store(scores_ptr + b * columns + column, score, mask=column < columns)
