"""The kernels that score leading tokens again, against the reference."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from er_sglang.drafting.rescoring import MARGIN, rescore_, rescore_reference_


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab", "hidden"), [(1, 151936, 5120), (33, 128256, 4096), (64, 32000 // 8, 896)])
def test_kernels_agree_with_the_reference(rows, vocab, hidden, dtype):
    torch.manual_seed(rows)
    hidden_BH = torch.randn(rows, hidden, device="cuda", dtype=dtype)
    weight_VH = torch.randn(vocab, hidden, device="cuda", dtype=dtype) * 3 * hidden**-0.5
    logits_BV = hidden_BH @ weight_VH.T
    logits_BV += 0.3 * torch.randn_like(logits_BV)
    found_BV, expected_BV = logits_BV.clone(), logits_BV.clone()
    rescore_(found_BV, hidden_BH, weight_VH)
    rescore_reference_(expected_BV, hidden_BH, weight_VH)
    changed = expected_BV != logits_BV
    assert changed.any() and (logits_BV.amax(1, keepdim=True) - logits_BV)[changed].max() <= MARGIN
    assert (
        (found_BV != logits_BV) == changed
    ).float().mean() > 0.99999  # a sum may round to the logit that it replaces
    torch.testing.assert_close(found_BV, expected_BV, rtol=0.01, atol=0.01)
    again_BV = logits_BV.clone()
    rescore_(again_BV, hidden_BH, weight_VH)
    assert torch.equal(again_BV, found_BV)
