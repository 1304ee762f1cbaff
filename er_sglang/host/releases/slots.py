"""KV slots of a request: how many it has, how many SGLang reserves, and who says so."""

from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

__all__ = ["ASSIGN", "ROW_HEADROOM", "allocated", "committed", "get_alloc_reserve_per_decode", "row", "set_committed"]

SEAMS = """
mem_cache.allocation_sizing:get_alloc_reserve_per_decode
mem_cache.allocation_sizing:get_req_to_token_extra_context_len
mem_cache.allocation:assign_req_to_token_pool_func req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size
"""

# Who says how many columns a row of the request table has beyond the context length.
ROW_HEADROOM = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
# Who writes slots into the request table.
ASSIGN = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"


def row(req) -> int | None:
    """Of the request table; None if it has none, so far or any more."""
    return req.kv.req_pool_idx


def committed(req) -> int:
    return req.kv.kv_committed_len


def set_committed(req, tokens: int) -> None:
    req.kv.kv_committed_len = tokens


def allocated(req) -> int:
    return req.kv.kv_allocated_len
