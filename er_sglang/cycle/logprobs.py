"""Log-probabilities of a cycle's emitted tokens, as SGLang defines them for speculation."""

from __future__ import annotations

import torch
from sglang.srt.environ import envs

from er_sglang.host.releases import adapter
from er_sglang.sampling import Sampler, Verdict

_logprobs = adapter("logprobs")


def attach_logprobs(batch, output, verdict: Verdict, sampler: Sampler) -> None:
    """The policy's, before filters, at the emitted positions.

    SGLang's own function normalizes a copy of all logits. It is left to what needs the whole rows: alternatives, chosen
    tokens, and the kept tokens of slime's patch.
    """
    if _needs_rows(batch):
        _attach_by_rows(batch, output, verdict)
        return
    info = batch.sampling_info
    logits_BNV = output.next_token_logits.view(*verdict.emitted_BN.shape, -1)
    x_BN = logits_BNV.gather(2, verdict.emitted_BN.unsqueeze(2)).squeeze(2)
    if info.is_all_greedy or envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get():
        logprobs_BN = x_BN - sampler.log_sum_exp(logits_BNV)
    else:
        logprobs_BN = x_BN / info.temperatures - verdict.lse_BN
    output.next_token_logprobs = logprobs_BN.clamp_min(torch.finfo(torch.float32).min)


def _needs_rows(batch) -> bool:
    return (
        any(batch.top_logprobs_nums or ())
        or any(ids is not None for ids in batch.token_ids_logprobs or ())
        or _logprobs.returns_kept_tokens(batch)
    )


def _attach_by_rows(batch, output, verdict: Verdict) -> None:
    width = verdict.emitted_BN.shape[1]
    rows = torch.arange(verdict.emitted_BN.numel(), device=verdict.emitted_BN.device).view(-1, width)
    index = torch.where(rows % width < verdict.accept_lens_B.view(-1, 1), rows, -1)
    _logprobs.attach(batch, output, verdict.emitted_BN.view(-1), index, verdict.accept_lens_B, width - 1)
