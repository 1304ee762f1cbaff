"""Stand-ins for what SGLang's CPU engine would ask of a GPU, so that SELF_QUANT serves on a CPU too.

Bound where SELF_QUANT is served on a CPU, and nowhere else.
"""

from __future__ import annotations

import torch
from sglang.srt.plugins.hook_registry import HookType

from er_sglang.host.releases import adapter


def _skip_kv_copy(pool) -> None:
    """A Triton kernel that compacts rejected branches of a draft tree; a chain has none."""


def _nothing_to_wait_for(*_) -> None:
    """A release of memory waits for the GPU that torch was built for, be there one or not."""


def _assign_slots(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, batch_size):
    """``assign_req_to_token_pool`` is a Triton kernel; this is what it does."""
    lengths = (end_offset - start_offset).tolist()
    for row, start, slots in zip(req_pool_indices, start_offset.tolist(), out_cache_loc.split(lengths)):
        req_to_token[row, start : start + len(slots)] = slots.to(req_to_token.dtype)


def _alloc_extend(
    allocator,
    prefix_lens,
    prefix_lens_cpu,
    seq_lens,
    seq_lens_cpu,
    last_loc,
    extend_num_tokens,
    num_new_pages=None,
):
    """``alloc_extend`` launches a Triton kernel; SGLang has the same in torch, but not wired to the CPU."""
    from sglang.srt.mem_cache.allocator.paged import alloc_extend_naive, get_num_new_pages

    if num_new_pages is None:
        num_new_pages = get_num_new_pages(
            seq_lens=seq_lens_cpu, page_size=allocator.page_size, prefix_lens=prefix_lens_cpu
        )
    if allocator.need_sort and num_new_pages > len(allocator.free_pages):
        allocator.merge_and_sort_free()
    if num_new_pages > len(allocator.free_pages):
        return None
    slots = torch.empty((extend_num_tokens,), dtype=torch.int64, device=allocator.device)
    alloc_extend_naive(
        prefix_lens.long(), seq_lens.long(), last_loc.long(), allocator.free_pages, slots, allocator.page_size, allocator.device
    )  # fmt: skip
    allocator.free_pages = allocator.free_pages[num_new_pages:]
    return slots


CPU_HOOKS = {
    "torch.cuda.synchronize": (HookType.REPLACE, _nothing_to_wait_for),
    "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup": (HookType.REPLACE, _skip_kv_copy),
    adapter("slots").ASSIGN: (HookType.REPLACE, _assign_slots),
    "sglang.srt.mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.alloc_extend": (HookType.REPLACE, _alloc_extend),
}
