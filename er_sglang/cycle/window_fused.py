"""The rows of an attention window as one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 256  # columns


def show_fused(
    req_to_token: torch.Tensor,
    rows_BC: torch.Tensor,
    requests_B: torch.Tensor,
    lengths_B: torch.Tensor,
    most: int,
    page_size: int,
    first: int,
    before: int,
    chosen: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """As `show`."""
    batch, columns = rows_BC.shape
    hidden_B = torch.empty_like(lengths_B)
    until, tokens = chosen or (None, None)
    _show_kernel[(batch, triton.cdiv(columns, BLOCK))](
        req_to_token, rows_BC, requests_B, lengths_B, until, tokens, hidden_B,
        req_to_token.stride(0), rows_BC.stride(0), 0 if chosen is None else tokens.stride(0),
        req_to_token.shape[1], columns, most, page_size, first, before,
        CHOSEN=chosen is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return hidden_B


# Sizes are those of a window, of which a server may have several.
@triton.jit(do_not_specialize=["columns", "most", "before"])
def _show_kernel(
    table_ptr, out_ptr, requests_ptr, lengths_ptr, until_ptr, tokens_ptr, hidden_ptr,
    table_stride, out_stride, tokens_stride, context, columns, most, page_size, first, before,
    CHOSEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(requests_ptr + b)
    hidden = tl.maximum(tl.load(lengths_ptr + b) - most + page_size - 1, 0)
    hidden -= hidden % page_size
    tl.store(hidden_ptr + b, hidden)
    position = column + tl.where(column >= first, hidden, 0)
    if CHOSEN:
        known = tl.load(until_ptr + row) >= before
        choice = known & (column >= first) & (column < before)
        token = tl.load(tokens_ptr + row * tokens_stride + column - first, mask=choice, other=0)
        position = tl.where(choice, token, position)
    position = tl.minimum(position, context - 1)
    here = column < columns
    slot = tl.load(table_ptr + row * table_stride + position, mask=here, other=0)
    tl.store(out_ptr + b * out_stride + column, slot, mask=here)
