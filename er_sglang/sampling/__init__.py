"""Drawing draft tokens and judging them: exact rejection sampling, one reference and one fused implementation."""

from __future__ import annotations

import torch

from er_sglang.sampling.base import Draft, RandomState, Sampler, SamplingParams, Verdict
from er_sglang.sampling.penalties import Penalties, Shaper

__all__ = [
    "Draft",
    "Penalties",
    "RandomState",
    "Sampler",
    "SamplingParams",
    "Shaper",
    "Verdict",
    "create_sampler",
    "create_shaper",
]


def create_sampler(device: torch.device) -> Sampler:
    """The fused sampler on CUDA, the reference elsewhere; both give the same tokens for the same inputs."""
    if device.type == "cuda":
        from er_sglang.sampling.fused import FusedSampler

        return FusedSampler()
    from er_sglang.sampling.reference import ReferenceSampler

    return ReferenceSampler()


def create_shaper(device: torch.device, max_batch: int) -> Shaper:
    """Likewise. max_batch: of any step, whether it drafts or not."""
    if device.type == "cuda":
        from er_sglang.sampling.penalties_fused import FusedShaper

        return FusedShaper(max_batch, device)
    from er_sglang.sampling.penalties import ReferenceShaper

    return ReferenceShaper()
