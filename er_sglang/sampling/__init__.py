"""Drawing draft tokens and judging them: exact rejection sampling, one reference and one fused implementation."""

from __future__ import annotations

import torch

from er_sglang.sampling.base import Draft, RandomState, Sampler, SamplingParams, Verdict

__all__ = ["Draft", "RandomState", "Sampler", "SamplingParams", "Verdict", "create_sampler"]


def create_sampler(device: torch.device, simulated_acceptance: float | None = None) -> Sampler:
    """The fused sampler on CUDA, the reference elsewhere; both give the same tokens for the same inputs."""
    if device.type == "cuda":
        from er_sglang.sampling.fused import FusedSampler

        return FusedSampler(simulated_acceptance)
    from er_sglang.sampling.reference import ReferenceSampler

    return ReferenceSampler(simulated_acceptance)
