"""Rescoring as two kernels: one reads the logits once, one the rows of the leaders."""

import torch
import triton
import triton.language as tl

BLOCK = 4096  # logits, a multiple of the classes
BLOCK_H = 1024


def rescore_fused_(
    logits_BV: torch.Tensor, hidden_BH: torch.Tensor, weight_VH: torch.Tensor, classes: int, margin: float
) -> None:
    """classes: a power of two."""
    rows, size = logits_BV.shape
    blocks = triton.cdiv(size, BLOCK)
    best = torch.empty((rows, blocks, classes), dtype=torch.float32, device=logits_BV.device)
    token = torch.empty((rows, blocks, classes), dtype=torch.int32, device=logits_BV.device)
    _leaders_kernel[(rows, blocks)](
        logits_BV, best, token, logits_BV.stride(0), size, blocks, BLOCK=BLOCK, CLASSES=classes
    )
    _rescore_kernel[(rows, classes)](
        logits_BV, hidden_BH, weight_VH, best, token,
        logits_BV.stride(0), hidden_BH.stride(0), weight_VH.stride(0), hidden_BH.shape[1], blocks,
        MARGIN=margin, CLASSES=classes, BLOCKS_POW2=triton.next_power_of_2(blocks), BLOCK_H=BLOCK_H,
    )  # fmt: skip


@triton.jit
def _leaders_kernel(
    logits_ptr, best_ptr, token_ptr, row_stride, size, blocks, BLOCK: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    """Per (row, block): the first largest logit of each class, and its token."""
    row, block = tl.program_id(0), tl.program_id(1)
    offset = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row.to(tl.int64) * row_stride + offset, mask=offset < size, other=float("-inf"))
    x = tl.reshape(x.to(tl.float32), (BLOCK // CLASSES, CLASSES))
    best, turn = tl.max(x, 0, return_indices=True)
    lane = tl.arange(0, CLASSES)
    out = (row * blocks + block) * CLASSES + lane
    tl.store(best_ptr + out, best)
    tl.store(token_ptr + out, block * BLOCK + turn * CLASSES + lane)


@triton.jit
def _rescore_kernel(
    logits_ptr, hidden_ptr, weight_ptr, best_ptr, token_ptr,
    logits_stride, hidden_stride, weight_stride, hidden_size, blocks,
    MARGIN: tl.constexpr, CLASSES: tl.constexpr, BLOCKS_POW2: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Per (row, class): score the leader again if it is near the row's largest logit."""
    row, which = tl.program_id(0), tl.program_id(1)
    block = tl.arange(0, BLOCKS_POW2)
    parts = (row * blocks + block[:, None]) * CLASSES + tl.arange(0, CLASSES)[None, :]
    largest = tl.max(tl.load(best_ptr + parts, mask=block[:, None] < blocks, other=float("-inf")))
    mine = (row * blocks + block) * CLASSES + which
    best, at = tl.max(tl.load(best_ptr + mine, mask=block < blocks, other=float("-inf")), 0, return_indices=True)
    if best >= largest - MARGIN:
        token = tl.load(token_ptr + (row * blocks + at) * CLASSES + which)
        total = tl.zeros((BLOCK_H,), tl.float32)
        for begin in range(0, hidden_size, BLOCK_H):
            offset = begin + tl.arange(0, BLOCK_H)
            h = tl.load(hidden_ptr + row.to(tl.int64) * hidden_stride + offset, mask=offset < hidden_size, other=0.0)
            w = tl.load(weight_ptr + token.to(tl.int64) * weight_stride + offset, mask=offset < hidden_size, other=0.0)
            total += h.to(tl.float32) * w.to(tl.float32)
        tl.store(logits_ptr + row.to(tl.int64) * logits_stride + token, tl.sum(total, 0))
