"""The choice as two kernels: the first finds the least score of those to take, two bits at a time, and takes them in the
order of the context; the second ranks them, each against all.

Keys stand for scores, and compare as they do: a score's bits plus 1, and 0 for what may not be taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

KEY_BITS = 30  # of scores below 2; even
BLOCK = 2048  # tokens that the first kernel looks at together
SELECT_WARPS = 16
RANKED = 32  # pages of a program of the second


def choose_fused(
    scores_BC: torch.Tensor,
    lengths_B: torch.Tensor,
    rows_B: torch.Tensor,
    first: int,
    last: int,
    page_size: int,
    tokens: torch.Tensor,
    until: torch.Tensor,
) -> None:
    """As `choose`; scores are below 2."""
    batch, columns = scores_BC.shape
    count = min(tokens.shape[1] // page_size, triton.cdiv(columns, page_size))
    page_pow2 = triton.next_power_of_2(page_size)
    pages_BK, keys_BK = torch.empty((2, batch, count), dtype=torch.int32, device=scores_BC.device)
    _select_kernel[(batch,)](
        scores_BC, lengths_B, pages_BK, keys_BK, columns, count, first, last, page_size,
        KEY_BITS=KEY_BITS, PAGE_POW2=page_pow2, PAGES=triton.cdiv(BLOCK, page_pow2), num_warps=SELECT_WARPS,
    )  # fmt: skip
    _rank_kernel[(batch, triton.cdiv(count, RANKED))](
        lengths_B, rows_B, pages_BK, keys_BK, tokens, until, tokens.stride(0), count, last, page_size,
        PAGE_POW2=page_pow2, RANKED=RANKED,
    )  # fmt: skip


@triton.jit
def _until(lengths_ptr, b, last, page_size):
    until = tl.maximum(tl.load(lengths_ptr + b) - last, 0)
    return until - until % page_size


@triton.jit
def _page_keys(row_ptr, page, begin, end, page_size, PAGE_POW2: tl.constexpr):
    """Of each page that of its highest score from position ``begin`` to ``end``."""
    within = tl.arange(0, PAGE_POW2)
    position = page[:, None] * page_size + within[None, :]
    here = (within[None, :] < page_size) & (position >= begin) & (position < end)
    score = tl.load(row_ptr + position, mask=here, other=0.0)
    key = tl.maximum(score.to(tl.int32, bitcast=True) + 1, 0)  # of what is no number too
    return tl.max(tl.where(here, key, 0), 1)


@triton.jit
def _counts(row_ptr, least, by, pages, begin, end, page_size, PAGE_POW2: tl.constexpr, PAGES: tl.constexpr):
    """How many pages have a key of ``least + by``, of ``least + 2 * by`` and of ``least + 3 * by`` or more."""
    counts = tl.zeros((PAGES,), tl.int64)  # all three, 20 bits each: there are less than a million pages
    for first_page in range(0, pages, PAGES):
        above = _page_keys(row_ptr, first_page + tl.arange(0, PAGES), begin, end, page_size, PAGE_POW2) - least
        counts += (above >= by).to(tl.int64)
        counts += ((above >= 2 * by).to(tl.int64) << 20) + ((above >= 3 * by).to(tl.int64) << 40)
    counts = tl.sum(counts, 0)
    return counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40


@triton.jit(do_not_specialize=["columns", "count"])
def _select_kernel(
    scores_ptr, lengths_ptr, pages_ptr, keys_ptr, columns, count, first, last, page_size,
    KEY_BITS: tl.constexpr, PAGE_POW2: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Per request: its ``count`` best pages and their keys, in the order of the context."""
    b = tl.program_id(0)
    row_ptr = scores_ptr + b.to(tl.int64) * columns
    end = tl.minimum(_until(lengths_ptr, b, last, page_size), columns).to(tl.int32)
    pages = tl.cdiv(columns, page_size)
    least = tl.full((), 0, tl.int32)
    for i in range(KEY_BITS // 2):
        by = 1 << (KEY_BITS - 2 - 2 * i)
        one, two, three = _counts(row_ptr, least, by, pages, first, end, page_size, PAGE_POW2, PAGES)
        least += by * ((one >= count).to(tl.int32) + (two >= count).to(tl.int32) + (three >= count).to(tl.int32))
    # All above the least, and of those that have it the first.
    above, _, _ = _counts(row_ptr, least, 1, pages, first, end, page_size, PAGE_POW2, PAGES)
    missing = count - above.to(tl.int32)
    taken = tl.full((), 0, tl.int32)
    for first_page in range(0, pages, PAGES):
        page = first_page + tl.arange(0, PAGES)
        key = _page_keys(row_ptr, page, first, end, page_size, PAGE_POW2)
        is_least = ((key == least) & (page < pages)).to(tl.int32)
        take = (key > least) | (is_least > 0) & (tl.cumsum(is_least, 0) <= missing)
        missing -= tl.sum(is_least, 0)
        place = taken + tl.cumsum(take.to(tl.int32), 0) - 1
        taken += tl.sum(take.to(tl.int32), 0)
        tl.store(pages_ptr + b * count + place, page, mask=take & (place < count))
        tl.store(keys_ptr + b * count + place, key, mask=take & (place < count))


@triton.jit(do_not_specialize=["count"])
def _rank_kernel(
    lengths_ptr, rows_ptr, pages_ptr, keys_ptr, tokens_ptr, until_ptr, tokens_stride, count, last, page_size,
    PAGE_POW2: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Per (request, some of its pages): their tokens, each page's after those of all with a higher key or before it."""
    b = tl.program_id(0)
    i = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    key = tl.load(keys_ptr + b * count + i, mask=i < count, other=0)
    rank = tl.zeros((RANKED,), tl.int32)
    for begin in range(0, count, RANKED):
        j = begin + tl.arange(0, RANKED)
        other = tl.load(keys_ptr + b * count + j, mask=j < count, other=-1)[None, :]
        ahead = (other > key[:, None]) | (other == key[:, None]) & (j[None, :] < i[:, None])
        rank += tl.sum(ahead.to(tl.int32), 1)
    row, within = tl.load(rows_ptr + b), tl.arange(0, PAGE_POW2)[None, :]
    page = tl.load(pages_ptr + b * count + i, mask=i < count, other=0)[:, None].to(tl.int64)
    at_ptr = tokens_ptr + row * tokens_stride + rank[:, None] * page_size + within
    tl.store(at_ptr, page * page_size + within, mask=(i[:, None] < count) & (within < page_size))
    tl.store(until_ptr + row, _until(lengths_ptr, b, last, page_size))
