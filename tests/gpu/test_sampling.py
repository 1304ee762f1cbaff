"""The fused sampler and shaper on CUDA: every case of the reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from er_sglang.sampling import RandomState
from tests.penalty_cases import check_cycle
from tests.sampling_cases import (
    FALSE_ALARM_RATE,
    REAL_VOCAB,
    REQUESTS,
    VOCAB,
    FilterCases,
    SamplerCases,
    exact,
    make_logits,
    make_params,
    p_value,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class TestFusedSampler(SamplerCases, FilterCases):
    @pytest.fixture
    def device(self):
        return "cuda"

    @pytest.fixture
    def sampler(self):
        from er_sglang.sampling.fused import FusedSampler

        return FusedSampler()


@pytest.mark.parametrize("min_p", [0.0, 0.02])
def test_sglangs_sampler_filters_in_the_order_that_ours_follows(min_p):
    """Jointly, or in sequence once the batch holds a min-p."""
    pytest.importorskip("sglang", reason="SGLang's sampler")
    from sglang.srt.runtime_context import get_flags

    from er_sglang.bench.sampling import plain_sampler, sampling_info

    filters = {"temperature": 1.3, "top_k": 20, "top_p": 0.85, "min_p": min_p}
    logits_V = make_logits(2, VOCAB)
    output = SimpleNamespace(next_token_logits=logits_V.repeat(REQUESTS, 1).cuda())
    info = sampling_info(make_params(REQUESTS, "cuda", **filters), {name for name, value in filters.items() if value})
    with get_flags().override(sampling_backend="flashinfer"):
        tokens = plain_sampler()(output, info, False, [0] * REQUESTS, [None] * REQUESTS, None)
    sequential = min_p > 0
    assert p_value(tokens.long(), exact(logits_V, **filters, sequential=sequential)) > FALSE_ALARM_RATE
    assert p_value(tokens.long(), exact(logits_V, **filters, sequential=not sequential)) < FALSE_ALARM_RATE


@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 50, "top_p": 0.9, "sequential": True}, {"min_p": 0.01}])
def test_equal_logits_have_equal_filters_and_normalizers(filters):
    """Ranks that see equal logits draw equal tokens only if no sum depends on the order of its terms."""
    from er_sglang.sampling.fused import FusedSampler

    rows, sampler, random = 64, FusedSampler(), RandomState.create(1, torch.device("cuda"))
    logits_BV = make_logits(3, 1, REAL_VOCAB).expand(rows, -1).contiguous().cuda()
    params, token_B = make_params(rows, "cuda", **filters), torch.empty(rows, dtype=torch.int64, device="cuda")
    found = torch.empty((2, 5, rows), device="cuda")
    for repeat in range(5):
        sampler.draw(logits_BV, params, random, 0, token_B, found[0, repeat], found[1, repeat])
    assert (found == found[:, :1, :1]).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [{}, {"batch": 30, "gamma": 15, "vocab": 5000}, {"vocab": REAL_VOCAB, "batch": 3}])
def test_fused_shaper(seed, sizes):
    from er_sglang.sampling.penalties_fused import FusedShaper

    check_cycle(FusedShaper(40, torch.device("cuda")), "cuda", seed, **sizes)
