"""Requests that cannot be drafted for: they ride along in the cycles of the others, or refuse drafting for the batch.

A rider takes the verify's first position alone, which is its plain step: its logits there are processed as in SGLang's
plain step (cycle/shaping.py), its token is drawn from p itself, and its drafts are ignored.
"""

from __future__ import annotations


def reason_to_ride(req) -> str | None:
    """Why a request must not be drafted for, None if it may."""
    if req.grammar is not None:
        return "grammar"
    return "custom-logit-processor" if req.custom_logit_processor else None


def riders(batch) -> dict[int, str]:
    """Rows of a ScheduleBatch that ride along, and why."""
    if not (batch.has_grammar or batch.sampling_info.has_custom_logit_processor):
        return {}
    return {row: reason for row, req in enumerate(batch.reqs) if (reason := reason_to_ride(req))}


def batch_blocker(batch) -> str | None:
    """Why no request of a ScheduleBatch may be drafted for, None if some may."""
    return "hidden-states" if batch.return_hidden_states else None
