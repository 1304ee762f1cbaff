"""The next slots as one kernel: of the two microseconds that each before a forward takes, it waits for most."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def next_slots_fused(
    req_to_token: torch.Tensor, rows_B: torch.Tensor, lengths_B: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `next_slots`."""
    positions_BN, slots_BN = (lengths_B.new_empty((len(lengths_B), width)) for _ in range(2))
    _next_slots_kernel[(len(lengths_B),)](
        req_to_token, rows_B, lengths_B, positions_BN, slots_BN,
        req_to_token.stride(0), width, WIDTH_POW2=triton.next_power_of_2(width),
    )  # fmt: skip
    return positions_BN.t(), slots_BN.t()


@triton.jit(do_not_specialize=["width"])
def _next_slots_kernel(
    table_ptr, rows_ptr, lengths_ptr, positions_ptr, slots_ptr, table_stride, width, WIDTH_POW2: tl.constexpr
):  # fmt: skip
    request, i = tl.program_id(0), tl.arange(0, WIDTH_POW2)
    here = i < width
    position = tl.load(lengths_ptr + request) + i
    slot = tl.load(table_ptr + tl.load(rows_ptr + request) * table_stride + position, mask=here, other=0)
    tl.store(positions_ptr + request * width + i, position, mask=here)
    tl.store(slots_ptr + request * width + i, slot.to(tl.int64), mask=here)
