"""What shapes the policy's logits of a cycle before they are sampled from, as in SGLang's plain step: logit bias at every
position, and for riders (host/riders.py) the grammar's mask and custom logit processors at the first."""

from __future__ import annotations

import torch
from sglang.srt.layers.sampler import apply_custom_logit_processor


def shape_logits(batch, logits_BNV: torch.Tensor, *, riding: bool) -> None:
    """In place. riding: whether a request of the batch rides along."""
    info = batch.sampling_info
    if info.logit_bias is not None:
        logits_BNV += info.logit_bias.unsqueeze(1)
    if riding:
        logits_BV = logits_BNV[:, 0].contiguous()
        _restrict(info, logits_BV)
        logits_BNV[:, 0] = logits_BV


def _restrict(info, logits_BV: torch.Tensor) -> None:
    """Masks are of the tokens before this step: SGLang ends one step before the next starts if one has a grammar."""
    info.update_regex_vocab_mask()
    if info.vocab_mask is not None:
        info.apply_mask_func(logits=logits_BV, vocab_mask=info.vocab_mask)
        info.vocab_mask = None  # SGLang drops it as early, since the batch outlives the step
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(logits_BV, info)
