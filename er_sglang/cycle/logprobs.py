"""Log-probabilities of a cycle's emitted tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache

import torch
from sglang.srt.layers.utils.logprob import compute_spec_v2_logprobs

from er_sglang.sampling import Verdict


def attach_logprobs(batch, output, verdict: Verdict, gamma: int) -> None:
    """The policy's log-probabilities at the emitted positions, as SGLang defines them for speculation."""
    width = gamma + 1
    rows = torch.arange(verdict.emitted_BN.numel(), device=verdict.emitted_BN.device).view(-1, width)
    index = torch.where(rows % width < verdict.accept_lens_B.view(-1, 1), rows, -1)
    arguments = [batch, output, verdict.emitted_BN.view(-1), index, gamma]
    if _takes_accept_lens(compute_spec_v2_logprobs):  # slime's top-p patch
        arguments.insert(4, verdict.accept_lens_B)
    compute_spec_v2_logprobs(*arguments)


@cache
def _takes_accept_lens(function: Callable) -> bool:
    return "accept_lens" in inspect.signature(function).parameters
