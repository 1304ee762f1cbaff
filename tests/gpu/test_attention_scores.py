"""The kernels that say what a draft attends to, against the reference."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from er_sglang.drafting.attention_scores import attention_scores, attention_scores_reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layers", "heads", "groups", "head_dim", "lengths"),
    [
        (4, 40, 8, 128, [8000, 1, 511, 513]),
        (3, 14, 2, 64, [100] * 33),
        (1, 16, 1, 256, [2048, 2047]),
        (2, 40, 2, 96, [300, 5]),
    ],
)
def test_kernels_agree_with_the_reference(layers, heads, groups, head_dim, lengths, dtype):
    torch.manual_seed(heads)
    slots, columns = 20_000, max(lengths) + 7
    queries_SBLHD = torch.randn(3, len(lengths) + 1, layers, heads, head_dim, device="cuda", dtype=dtype)
    keys = [torch.randn(slots, groups, head_dim, device="cuda", dtype=dtype) for _ in range(layers)]
    table = torch.stack([torch.randperm(slots, device="cuda")[: columns + 3] for _ in range(64)]).int()
    rows_B = torch.randperm(64, device="cuda")[: len(lengths)]
    kept_B = 1 + torch.arange(len(lengths), device="cuda", dtype=torch.int32) % 4
    arguments = (
        queries_SBLHD,
        kept_B,
        keys,
        table,
        rows_B,
        torch.tensor(lengths, device="cuda"),
        columns,
        head_dim**-0.5,
    )
    found_BC, expected_BC = attention_scores(*arguments), attention_scores_reference(*arguments)
    torch.testing.assert_close(found_BC.sum(1), torch.ones_like(found_BC[:, 0]), rtol=2e-3, atol=0)
    torch.testing.assert_close(found_BC, expected_BC, rtol=0.02, atol=1e-6)
    assert torch.equal(attention_scores(*arguments), found_BC)
