"""Penalties of SGLang's requests: which they are, whose counts are in which row, and SGLang's own penalizers at rest.

SGLang counts the last token of a step, at the next step: with overlap scheduling that is one token late, and after a
retraction it starts from nothing. Where SELF_QUANT serves, the counts of sampling/penalties.py take their place, in
plain steps too. They are on the device and are updated as soon as a step's tokens are known there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from sglang.srt.plugins.hook_registry import HookType

from er_sglang.host.releases import adapter
from er_sglang.sampling.penalties import Penalties, PenaltyTable, RequestPenalties

_slots = adapter("slots")


def penalties_of(req) -> RequestPenalties | None:
    """What SGLang's penalizers take from a request, None if they take nothing."""
    params = req.sampling_params
    kinds = (params.frequency_penalty, params.presence_penalty, params.repetition_penalty, params.min_new_tokens)
    if kinds == (0, 0, 1, 0):
        return None
    stop_tokens = set()
    if params.min_new_tokens:
        stop_tokens |= params.stop_token_ids or set()
        stop_tokens |= req.tokenizer.additional_stop_token_ids or set()
        stop_tokens |= {req.tokenizer.eos_token_id} - {None}
    return RequestPenalties(
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        repetition=params.repetition_penalty,
        least_tokens=len(req.origin_input_ids) + params.min_new_tokens,
        stop_tokens=stop_tokens,
        emitted=req.output_ids,
    )


class PenalisedRequests:
    """The running requests with penalties, each with a row of the table."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._table = PenaltyTable(vocab_size, device)
        self._row_of = {}

    def forget(self) -> None:
        """No request is left: give the memory back."""
        self._row_of = {}
        self._table.shrink()

    def admit(self, reqs: Sequence) -> None:
        """``reqs`` are about to be prefilled: for the first time, in their next chunk, or after a retraction."""
        self._row_of = {
            req: row for req, row in self._row_of.items() if not (req.finished() or _slots.row(req) is None)
        }
        taken = set(self._row_of.values())
        free = (row for row in count(1) if row not in taken)
        reset = {}
        for req in reqs:
            if (penalties := penalties_of(req)) is not None:
                if req not in self._row_of:
                    self._row_of[req] = next(free)
                reset[self._row_of[req]] = penalties
        if reset:
            self._table.reset(reset)

    def of(self, reqs: Sequence) -> Penalties | None:
        """The counts of a step's requests, None if none is penalised."""
        if not self._row_of:
            return None
        rows = [self._row_of.get(req, 0) for req in reqs]
        return self._table.of(rows) if any(rows) else None


def _leave_unprepared(original, penalizer) -> bool:
    return False


PENALTY_HOOKS = {
    "sglang.srt.sampling.penaltylib.orchestrator._BatchedPenalizer.prepare_if_required": (
        HookType.AROUND,
        _leave_unprepared,
    )
}
