"""What shapes the policy's logits before they are sampled from, to SGLang's effect: penalties, logit bias, and for
riders (host/riders.py) the grammar's mask and custom logit processors.

In a cycle, penalties and bias shape every position, and all that is a rider's its first. In a plain step, penalties are
ours and the rest is SGLang's own.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.sampler import apply_custom_logit_processor

from er_sglang.cycle.step import Step
from er_sglang.sampling import Penalties, Shaper


def shape_logits(batch, step: Step, shaper: Shaper, logits_BNV: torch.Tensor, drafted_GB: torch.Tensor) -> None:
    """Those of a cycle, in place. shaper: loaded with the step's penalties and bias, as the draft was."""
    if step.penalties is not None or step.bias_BV is not None:
        shaper.shape(logits_BNV.flatten(0, 1), step.seq_lens_B, drafted_GB)
    if step.rides_B is not None:
        logits_BV = logits_BNV[:, 0].contiguous()
        _restrict(batch.sampling_info, logits_BV)
        logits_BNV[:, 0] = logits_BV


def penalise_plain_step(info, penalties: Penalties, shaper: Shaper, committed_B: torch.Tensor) -> None:
    """Have SGLang's sampler penalise first. info: a step's own copy of the batch's SamplingBatchInfo.
    committed_B: int64, length of each request without its last emitted token."""
    shaper.load(penalties, None)

    def apply_logits_bias(logits_BV: torch.Tensor) -> None:
        shaper.shape(logits_BV, committed_B, committed_B.new_empty((0, len(committed_B))))
        type(info).apply_logits_bias(info, logits_BV)

    info.apply_logits_bias = apply_logits_bias


def _restrict(info, logits_BV: torch.Tensor) -> None:
    """Masks are of the tokens before this step: SGLang ends one step before the next starts if one has a grammar."""
    info.update_regex_vocab_mask()
    if info.vocab_mask is not None:
        info.apply_mask_func(logits=logits_BV, vocab_mask=info.vocab_mask)
        info.vocab_mask = None  # SGLang drops it as early, since the batch outlives the step
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(logits_BV, info)
