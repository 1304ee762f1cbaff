"""KV slots of a request: as many as its length limit leaves room for, however many a cycle could fill.

SGLang reserves slots for two cycles beyond what is committed, at every step. Near its limit a request would hold slots
for tokens that it can never emit, and one that just fits the memory would be aborted. What a cycle writes beyond
the limit goes to slot 0, which SGLang keeps for padding; nobody is given the tokens that could be read there.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.utils.common import is_pin_memory_available

from er_sglang.host.releases import adapter

_slots = adapter("slots")


def _limit(req) -> int:
    """Tokens of a request, prompt included, when it has reached its length limit."""
    return len(req.origin_input_ids) + req.sampling_params.max_new_tokens


@contextmanager
def _reserving_within_limits(reqs: Sequence) -> Iterator[bool]:
    """SGLang reserves up to ``kv_committed_len`` plus a constant: in the block, that sum stays within the limits.

    Yields whether any request is near its limit.
    """
    reserve = _slots.get_alloc_reserve_per_decode()
    near = [(req, tokens) for req in reqs if (tokens := _slots.committed(req)) + reserve > _limit(req)]
    for req, _ in near:
        _slots.set_committed(req, _limit(req) - reserve)
    try:
        yield bool(near)
    finally:
        for req, tokens in near:
            _slots.set_committed(req, tokens)


def _count_needed(original, batch, requests, page_size):
    with _reserving_within_limits(requests):
        return original(batch, requests, page_size)


def _reserve(original, batch):
    with _reserving_within_limits(batch.reqs) as near:
        original(batch)
    if near:
        reserved_B = torch.tensor(
            [_slots.allocated(req) for req in batch.reqs], pin_memory=is_pin_memory_available(batch.device)
        ).to(batch.device, non_blocking=True)
        beyond_BN = reserved_B.view(-1, 1) + torch.arange(_slots.get_alloc_reserve_per_decode(), device=batch.device)
        # Not `[...] = 0`, which copies its 0 from the host and so waits for all that is in flight.
        table = batch.req_to_token_pool.req_to_token
        table.index_put_((batch.req_pool_indices.view(-1, 1), beyond_BN), table.new_zeros(()))


def _commit_what_has_slots(outputs, processor, *, batch, **_):
    """Tokens beyond the limit count as accepted, but the radix cache must not be given their KV."""
    for req in batch.reqs:
        if (tokens := _slots.allocated(req)) < _slots.committed(req):
            _slots.set_committed(req, tokens)


def compile_reservation(req_to_token: torch.Tensor, most_requests: int) -> None:
    """On CUDA, have Triton compile SGLang's kernel that writes reserved slots into the request table, of any batch.

    It is another one for each power of two of requests, and for slots that begin at a multiple of 16 bytes or do not,
    which is chance: else 0.1 s each, amid the first rollouts.
    """
    if req_to_token.device.type != "cuda":
        return
    assign = pkgutil.resolve_name(_slots.ASSIGN)
    slots = torch.zeros(2, dtype=torch.int64, device=req_to_token.device)
    for power in range((most_requests - 1).bit_length() + 1):
        row_B = torch.zeros(1 << power, dtype=torch.int64, device=req_to_token.device)
        none_B = row_B.int()
        for first in (0, 1):
            assign(row_B, req_to_token, none_B, none_B, slots[first:], len(row_B))


RESERVATION_HOOKS = {
    "sglang.srt.managers.schedule_batch.ScheduleBatch._new_tokens_required_next_decode_spec_v2": (
        HookType.AROUND,
        _count_needed,
    ),
    "sglang.srt.speculative.eagle_utils.eagle_prepare_for_decode": (HookType.AROUND, _reserve),
    "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
    "_normalize_decode_outputs": (HookType.AFTER, _commit_what_has_slots),
}
