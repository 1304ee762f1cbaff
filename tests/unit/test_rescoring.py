"""The leaders of a quantized lm_head: which they are, and their kernels in Triton's interpreter."""

import pytest
import torch

from er_sglang.drafting.rescoring import CLASSES, MARGIN, rescore_reference_

H, V = 96, 5000  # no multiples of a block


def case(rows=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    hidden_BH = torch.randn(rows, H, generator=generator)
    weight_VH = torch.randn(V, H, generator=generator) * 0.4
    logits_BV = hidden_BH @ weight_VH.T + 0.5 * torch.randn(rows, V, generator=generator)
    return logits_BV.to(dtype), hidden_BH.to(dtype), weight_VH.to(dtype)


def test_leaders_are_the_policys_and_all_others_stay():
    logits_BV, hidden_BH, weight_VH = case()
    found_BV = logits_BV.clone()
    rescore_reference_(found_BV, hidden_BH, weight_VH)
    for before_V, found_V, hidden_H in zip(logits_BV, found_BV, hidden_BH):
        leaders = {}
        for token, logit in enumerate(before_V.tolist()):  # the first of the largest
            if logit > leaders.get(token % CLASSES, (None, -torch.inf))[1]:
                leaders[token % CLASSES] = (token, logit)
        rescored = [token for token, logit in leaders.values() if logit >= before_V.max() - MARGIN]
        assert 5 < len(rescored) < CLASSES
        torch.testing.assert_close(found_V[rescored], weight_VH[rescored] @ hidden_H)
        others = torch.ones(V, dtype=torch.bool)
        others[rescored] = False
        assert torch.equal(found_V[others], before_V[others]) and not torch.equal(found_V, before_V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_agree_with_the_reference(dtype):
    fused = pytest.importorskip("er_sglang.drafting.rescoring_fused", reason="the kernels are written in Triton")
    logits_BV, hidden_BH, weight_VH = case(5, dtype)
    logits_BV[1, [7, 7 + CLASSES]] = logits_BV[1].max() + 1  # the first of equals leads
    logits_BV[2, 4990:] = -torch.inf
    found_BV = logits_BV.clone()
    fused.rescore_fused_(found_BV, hidden_BH, weight_VH, CLASSES, MARGIN)
    rescore_reference_(logits_BV, hidden_BH, weight_VH)
    torch.testing.assert_close(found_BV, logits_BV)
