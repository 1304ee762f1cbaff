"""The reference sampler, and the fused one in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from er_sglang.sampling.philox import philox
from er_sglang.sampling.reference import ReferenceSampler
from tests import sampling_cases
from tests.cuda_on_cpu import Kernel
from tests.sampling_cases import FilterCases, SamplerCases, test_reference_distribution_is_the_definition  # noqa: F401


class TestReferenceSampler(SamplerCases):
    @pytest.fixture
    def device(self):
        return "cpu"

    @pytest.fixture
    def sampler(self):
        return ReferenceSampler()


@pytest.fixture(scope="module")
def summarize_rows(tmp_path_factory):
    fused = pytest.importorskip("er_sglang.sampling.fused", reason="the fused sampler is written in Triton")
    source = Path(fused.__file__).with_name("summary.cu")
    return Kernel(source, "summarize_rows", fused.SUMMARY_THREADS, tmp_path_factory.mktemp("filters"))


class TestFusedSamplerInterpreted:
    """Token for token against the reference; the statistical cases run on a GPU (tests/gpu), they are slow here."""

    @pytest.fixture
    def device(self, monkeypatch):
        monkeypatch.setattr(sampling_cases, "REQUESTS", 10)
        return "cpu"

    @pytest.fixture
    def sampler(self, monkeypatch, summarize_rows):
        from er_sglang.sampling import fused

        monkeypatch.setattr(fused, "summary_kernel", lambda: summarize_rows)
        return fused.FusedSampler()

    test_filters = FilterCases.test_filters_keep_what_the_reference_keeps
    test_wide_rows = SamplerCases.test_wide_rows_agree_with_the_reference
    test_top_p_of_one = SamplerCases.test_top_p_of_one_keeps_every_token
    test_top_p_at_a_real_vocabulary = SamplerCases.test_top_p_at_a_real_vocabulary
    test_no_numbers = SamplerCases.test_a_draft_of_no_numbers_is_not_accepted
    test_nan_shows = SamplerCases.test_a_logit_that_is_no_number_shows
    test_masked_rider = SamplerCases.test_a_rider_of_which_a_mask_leaves_two_tokens
    test_greedy = SamplerCases.test_greedy_requests_accept_while_the_argmax_agrees
    test_greedy_ties = SamplerCases.test_greedy_ties_go_to_the_first_token
    test_equal = SamplerCases.test_equal_distributions_accept_everything


def test_philox_known_answers() -> None:
    """Random123's known-answer vectors for philox4x32-10, first word."""
    cases = [((0, 0, 0, 0), (0, 0), 0x6627E8D5), ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), 0x408F276D)]
    for (c0, c1, c2, c3), (k0, k1), expected in cases:
        seed = k0 | (k1 << 32)
        seed -= (seed >> 63) << 64  # as int64
        state = torch.tensor([seed, c3], dtype=torch.int64)
        assert philox(state, torch.tensor(c0), torch.tensor(c1), c2).item() == expected
