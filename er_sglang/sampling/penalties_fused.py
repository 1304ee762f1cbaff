"""Penalties and bias as one Triton kernel that reads and writes each row of logits once.

It belongs to the draft's graph, which knows neither where the table and the biases lie nor whose they are: each request
has two addresses in a fixed buffer, 0 where there is nothing to do. A program without an address ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from er_sglang.sampling.penalties import STOP, Shaper

BLOCK = 4096


# Alignment and values of these vary, and no load is wider for knowing them.
@triton.jit(do_not_specialize=("committed_ptr", "drafted_ptr", "drafted_stride", "width", "first"))
def _shape_kernel(
    logits_ptr, words_ptr, bias_ptr, committed_ptr, drafted_ptr, logits_stride, drafted_stride, size, width, first,
    STOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per (row, block) of logits; words_ptr and bias_ptr: int64, addresses of each request."""
    row, block = tl.program_id(0), tl.program_id(1)
    request = row // width
    position = first + row % width
    words_address = tl.load(words_ptr + request)
    bias_address = tl.load(bias_ptr + request)
    if (words_address != 0) | (bias_address != 0):
        offset = block * BLOCK + tl.arange(0, BLOCK)
        valid = offset < size
        logit_ptr = logits_ptr + row.to(tl.int64) * logits_stride + offset
        x = tl.load(logit_ptr, mask=valid, other=0.0)
        if words_address != 0:
            word = tl.load(words_address.to(tl.pointer_type(tl.int32)) + offset, mask=valid, other=0)
            count = word & (STOP - 1)
            for i in range(position):
                token = tl.load(drafted_ptr + i * drafted_stride + request).to(tl.int32)
                count += (offset == token).to(tl.int32)
            settings_ptr = words_address.to(tl.pointer_type(tl.float32)) + size
            frequency, presence = tl.load(settings_ptr), tl.load(settings_ptr + 1)
            repetition, least_tokens = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3)
            seen = count > 0
            x -= frequency * count.to(tl.float32) + tl.where(seen, presence, 0.0)
            x = tl.where(seen, tl.where(x < 0, x * repetition, x / repetition), x)
            if tl.load(committed_ptr + request) + 1 + position < least_tokens:
                x = tl.where(word >= STOP, float("-inf"), x)
        if bias_address != 0:
            x += tl.load(bias_address.to(tl.pointer_type(tl.float32)) + offset, mask=valid, other=0.0)
        tl.store(logit_ptr, x, mask=valid)


@triton.jit
def _count_kernel(words_ptr, emitted_ptr, accept_lens_ptr, width, WIDTH_POW2: tl.constexpr):
    """Per request: one more of each token that it has emitted."""
    request = tl.program_id(0)
    words_address = tl.load(words_ptr + request)
    if words_address != 0:
        i = tl.arange(0, WIDTH_POW2)
        emitted = i < tl.load(accept_lens_ptr + request)
        token = tl.load(emitted_ptr + request * width + i, mask=emitted, other=0)
        tl.atomic_add(words_address.to(tl.pointer_type(tl.int32)) + token, 1, mask=emitted)


class FusedShaper(Shaper):
    def __init__(self, max_batch: int, device: torch.device) -> None:
        """max_batch: of any step, whether it drafts or not."""
        self._addresses = torch.zeros((2, max_batch), dtype=torch.int64, device=device)
        self._loaded = None

    def load(self, penalties, bias_BV) -> None:
        nothing = penalties is None and bias_BV is None
        if nothing and self._loaded is None:
            return
        self._loaded = None if nothing else (penalties, bias_BV)  # their memory lives as long as its addresses
        addresses = torch.zeros_like(self._addresses, device="cpu", pin_memory=self._addresses.is_cuda)
        if penalties is not None:
            words = penalties.words
            stride_bytes = words.stride(0) * words.element_size()
            found = [words.data_ptr() + row * stride_bytes if row else 0 for row in penalties.rows]
            addresses[0, : len(found)] = torch.tensor(found)
        if bias_BV is not None:
            stride_bytes = bias_BV.stride(0) * bias_BV.element_size()
            addresses[1, : len(bias_BV)] = bias_BV.data_ptr() + stride_bytes * torch.arange(len(bias_BV))
        self._addresses.copy_(addresses, non_blocking=True)

    def shape(self, logits_RV, committed_B, drafted_GB, first=0) -> None:
        rows, size = logits_RV.shape
        _shape_kernel[(rows, triton.cdiv(size, BLOCK))](
            logits_RV, self._addresses[0], self._addresses[1], committed_B, drafted_GB,
            logits_RV.stride(0), drafted_GB.stride(0), size, rows // committed_B.shape[0], first,
            STOP=STOP, BLOCK=BLOCK,
        )  # fmt: skip

    def count(self, emitted_BN, accept_lens_B) -> None:
        batch, width = emitted_BN.shape
        _count_kernel[(batch,)](
            self._addresses[0], emitted_BN, accept_lens_B, width, WIDTH_POW2=triton.next_power_of_2(width)
        )
