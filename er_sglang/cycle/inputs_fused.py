"""The load of a chain's buffers as one kernel, instead of a copy or two per buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from er_sglang.cycle.step import Step

if TYPE_CHECKING:
    from er_sglang.cycle.inputs import ChainInputs

BLOCK = 32  # requests


def load_fused(
    inputs: ChainInputs, step: Step, gamma: int, bs: int, rows_B: torch.Tensor, hidden_B: torch.Tensor | None
) -> None:
    """As `ChainInputs.load`."""
    _load_kernel[(triton.cdiv(bs, BLOCK),)](
        step.last_B, step.slots_NB, step.positions_NB, rows_B, hidden_B, *step.params,
        inputs.tokens, inputs.slots, inputs.positions, inputs.seq_lens, inputs.rows, *inputs.params,
        *step.slots_NB.stride(), *step.positions_NB.stride(), inputs.slots.stride(0), step.batch_size, bs, gamma,
        HIDES=hidden_B is not None, BLOCK=BLOCK,
    )  # fmt: skip


@triton.jit
def _copy(to_ptr, from_ptr, request, here, padded, padding):
    tl.store(to_ptr + request, tl.load(from_ptr + request, mask=here, other=padding), mask=padded)


# What varies from step to step is not specialised on: a server would compile in the middle of a rollout.
@triton.jit(
    do_not_specialize=["slots_step", "slots_request", "positions_step", "positions_request", "batch", "bs", "gamma"]
)
def _load_kernel(
    last_ptr, slots_ptr, positions_ptr, rows_ptr, hidden_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, sequential_ptr,
    to_tokens_ptr, to_slots_ptr, to_positions_ptr, to_seq_lens_ptr, to_rows_ptr,
    to_temperature_ptr, to_top_k_ptr, to_top_p_ptr, to_min_p_ptr, to_sequential_ptr,
    slots_step, slots_request, positions_step, positions_request, to_step, batch, bs, gamma,
    HIDES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here, padded = request < batch, request < bs
    _copy(to_tokens_ptr, last_ptr, request, here, padded, 0)
    _copy(to_rows_ptr, rows_ptr, request, here, padded, 0)
    _copy(to_temperature_ptr, temperature_ptr, request, here, here, 1.0)
    _copy(to_top_k_ptr, top_k_ptr, request, here, padded, 1)
    _copy(to_top_p_ptr, top_p_ptr, request, here, here, 1.0)
    _copy(to_min_p_ptr, min_p_ptr, request, here, here, 0.0)
    _copy(to_sequential_ptr, sequential_ptr, request, here, here, 0)
    hidden = tl.zeros((BLOCK,), tl.int64)
    if HIDES:
        hidden = tl.load(hidden_ptr + request, mask=here, other=0)
    for i in range(gamma):
        slot = tl.load(slots_ptr + i * slots_step + request * slots_request, mask=here, other=0)
        position = tl.load(positions_ptr + i * positions_step + request * positions_request, mask=here, other=0)
        seq_len = tl.where(here, position + 1 - hidden, 1)
        tl.store(to_slots_ptr + i * to_step + request, slot, mask=padded)
        tl.store(to_positions_ptr + i * to_step + request, position, mask=padded)
        tl.store(to_seq_lens_ptr + i * to_step + request, seq_len, mask=padded)
