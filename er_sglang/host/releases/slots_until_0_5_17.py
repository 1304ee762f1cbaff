"""KV slots of a request: how many it has, how many SGLang reserves, and who says so."""

from sglang.srt.mem_cache.allocation_sizing import get_alloc_reserve_per_decode

__all__ = ["ASSIGN", "ROW_HEADROOM", "allocated", "committed", "get_alloc_reserve_per_decode", "row", "set_committed"]

SEAMS = """
mem_cache.allocation_sizing:get_alloc_reserve_per_decode server_args
mem_cache.allocation_sizing:get_req_to_token_extra_context_len server_args
mem_cache.allocation:assign_req_to_token_pool_func req_pool_indices req_to_token start_offset end_offset out_cache_loc batch_size
"""

# Who says how many columns a row of the request table has beyond the context length.
ROW_HEADROOM = "sglang.srt.mem_cache.allocation_sizing.get_req_to_token_extra_context_len"
# Who writes slots into the request table.
ASSIGN = "sglang.srt.mem_cache.allocation.assign_req_to_token_pool_func"


def row(req) -> int | None:
    """Of the request table; None if it has none, so far or any more."""
    return req.req_pool_idx


def committed(req) -> int:
    return req.kv_committed_len


def set_committed(req, tokens: int) -> None:
    req.kv_committed_len = tokens


def allocated(req) -> int:
    """Also of one that has given its slots back, as the last step of an overlapped schedule finds it."""
    return committed(req) if req.kv is None else req.kv.kv_allocated_len
