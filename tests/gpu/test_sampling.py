"""The fused sampler and shaper on CUDA: every case of the reference."""

from __future__ import annotations

import pytest
import torch

from tests.penalty_cases import check_cycle
from tests.sampling_cases import REAL_VOCAB, SamplerCases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class TestFusedSampler(SamplerCases):
    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def sampler(self):
        from er_sglang.sampling.fused import FusedSampler

        return FusedSampler()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [{}, {"batch": 30, "gamma": 15, "vocab": 5000}, {"vocab": REAL_VOCAB, "batch": 3}])
def test_fused_shaper(seed, sizes):
    from er_sglang.sampling.penalties_fused import FusedShaper

    check_cycle(FusedShaper(40, torch.device("cuda")), "cuda", seed, **sizes)
