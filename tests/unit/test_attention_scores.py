"""Attention scores, against softmax request by request, and their kernels in Triton's interpreter."""

import pytest
import torch

from er_sglang.drafting.attention_scores import attention_scores_reference

STEPS, LAYERS, HEADS, GROUPS, D = 3, 2, 6, 2, 32
SLOTS, CONTEXT = 1500, 1300
LENGTHS = [1, 64, 700, 1190]
COLUMNS = 1200
KEPT = [1, 3, 4, 2]


def case(dtype=torch.float32, heads=HEADS, head_dim=D):
    generator = torch.Generator().manual_seed(1)
    queries_SBLHD = torch.randn(STEPS, len(LENGTHS) + 2, LAYERS, heads, head_dim, generator=generator).to(dtype)
    keys = [torch.randn(SLOTS, GROUPS, head_dim, generator=generator).to(dtype) for _ in range(LAYERS)]
    table = torch.stack([torch.randperm(SLOTS, generator=generator)[:CONTEXT] for _ in range(7)]).int()
    rows_B = torch.tensor([5, 0, 3, 6])
    return (
        queries_SBLHD,
        torch.tensor(KEPT, dtype=torch.int32),
        keys,
        table,
        rows_B,
        torch.tensor(LENGTHS),
        COLUMNS,
        0.3,
    )


def test_weights_are_the_mean_of_all_layers_and_heads():
    queries_SBLHD, _, keys, table, rows_B, lengths_B, columns, scale = arguments = case()
    found_BC = attention_scores_reference(*arguments)
    for b, (row, length) in enumerate(zip(rows_B, lengths_B)):
        weights = [
            (
                scale
                * keys[layer][table[row, :length].long(), head // 3]
                @ queries_SBLHD[min(KEPT[b], STEPS) - 1, b, layer, head]
            ).softmax(0)
            for layer in range(LAYERS)
            for head in range(HEADS)
        ]
        torch.testing.assert_close(found_BC[b, :length], torch.stack(weights).mean(0))
        assert not found_BC[b, length:].any()


def test_what_lies_beyond_a_length_may_be_anything():
    _, _, keys, table, rows_B, lengths_B, *_ = arguments = case()
    expected_BC = attention_scores_reference(*arguments)
    used = torch.cat([table[row, :length] for row, length in zip(rows_B, lengths_B)]).unique().long()
    for k_SGD in keys:
        spoilt = torch.full_like(k_SGD, torch.nan)
        spoilt[used] = k_SGD[used]
        k_SGD.copy_(spoilt)
    assert keys[0].isnan().any()
    torch.testing.assert_close(attention_scores_reference(*arguments), expected_BC)


@pytest.mark.parametrize(
    "dtype, heads, head_dim", [(torch.float32, 6, 32), (torch.float16, 6, 32), (torch.float32, 40, 48)]
)
def test_kernels_agree_with_the_reference(dtype, heads, head_dim):
    fused = pytest.importorskip("er_sglang.drafting.attention_scores_fused", reason="the kernels are written in Triton")
    arguments = case(dtype, heads, head_dim)
    found_BC = fused.attention_scores_fused(*arguments)
    torch.testing.assert_close(found_BC, attention_scores_reference(*arguments), rtol=1e-3, atol=1e-6)
