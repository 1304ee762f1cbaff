"""The fused sampler on CUDA: every case of the reference."""

from __future__ import annotations

import pytest
import torch

from tests.sampling_cases import SamplerCases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class TestFusedSampler(SamplerCases):
    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def sampler(self):
        from er_sglang.sampling.fused import FusedSampler

        return FusedSampler()
