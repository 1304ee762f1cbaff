"""What SGLang leaves of a Linear's weight after loading, read back; no server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.awq.awq import AWQLinearMethod
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from er_sglang.drafting.policy_weight import policy_weight, unreadable

N, K = 256, 384


@pytest.fixture
def codes() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)


def fp8_layer(weight: torch.Tensor, block: list[int] | None = None, **scales: torch.Tensor) -> SimpleNamespace:
    method = Fp8LinearMethod.__new__(Fp8LinearMethod)
    method.block_quant = block is not None
    method.quant_config = SimpleNamespace(weight_block_size=block)
    return SimpleNamespace(weight=weight, quant_method=method, orig_dtype=torch.bfloat16, **scales)


@pytest.mark.parametrize("shape", [(N, 1), (1, N), (1,), ()], ids=str)
def test_transposed_with_scales_of_channels_or_of_the_tensor(codes, shape):
    scale = torch.rand(shape)
    weight = policy_weight(layer := fp8_layer(codes.t(), weight_scale=scale))
    assert unreadable(layer) is None
    assert weight.codes_NK.is_contiguous() and weight.codes_NK.data_ptr() == codes.data_ptr()
    expected = codes.float() * (scale.reshape(N, 1) if scale.numel() == N else scale)
    assert torch.equal(weight.dequantize(), expected.bfloat16())


def test_scales_of_blocks(codes):
    scales = torch.rand(N // 128, K // 128)
    weight = policy_weight(layer := fp8_layer(codes, [128, 128], weight_scale_inv=scales))
    assert unreadable(layer) is None
    expected = codes.float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(weight.dequantize(), expected.bfloat16())


def test_a_weight_in_bf16_is_itself():
    layer = SimpleNamespace(weight=torch.rand(N, K), quant_method=UnquantizedLinearMethod())
    assert unreadable(layer) is None
    assert policy_weight(layer).data_ptr() == layer.weight.data_ptr()


def test_what_cannot_be_read_has_a_reason(codes):
    awq = SimpleNamespace(quant_method=AWQLinearMethod.__new__(AWQLinearMethod))
    assert unreadable(awq) == "weight is handled by AWQLinearMethod"
    marlin = fp8_layer(torch.zeros(K // 16, N * 4, dtype=torch.int32), weight_scale=torch.rand(1, N))
    assert "repacked for Marlin" in unreadable(marlin)
    ue8m0 = fp8_layer(codes, [128, 128], weight_scale_inv=torch.zeros(N, 1, dtype=torch.int32))
    assert "--fp8-gemm-backend triton" in unreadable(ue8m0)
