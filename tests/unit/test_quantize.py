"""Weight formats without a GPU: the numbers, the Marlin layout, and the fused kernels in Triton's interpreter."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from er_sglang.config import WEIGHT_FORMATS
from er_sglang.quantize import create_format, marlin_layout, rtn
from er_sglang.quantize.scaled import ScaledWeight

CPU = torch.device("cpu")


def normal_weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def awkward_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal rows, and rows that are zero, one-sided, constant, huge, tied at both ends or with one outlier."""
    weight = normal_weight(n, k, dtype)
    weight[1] = 0
    weight[3] = weight[3].abs()
    weight[5] = -weight[5].abs()
    weight[7] = 0.5
    weight[9] *= 1000
    weight[11] = torch.tensor([0.25, -0.25], dtype=dtype).repeat(k // 2)
    weight[13, ::7] = 3
    return weight


def scaled_weight(
    n: int, k: int, block: tuple[int, int], dtype: torch.dtype, powers_of_two: bool = False
) -> ScaledWeight:
    """Any code but NaN, and scales of either sign."""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 127, (n, k), generator=generator) + 128 * torch.randint(0, 2, (n, k), generator=generator)
    scales = torch.randn(-(-n // block[0]), -(-k // block[1]), generator=generator) * 0.01
    if powers_of_two:
        scales = 2.0 ** scales.abs().log2().round() * scales.sign()
    return ScaledWeight(codes.to(torch.uint8).view(torch.float8_e4m3fn), scales, block, dtype)


def relative_mse(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    return ((weight.float() - approximation.float()).square().sum() / weight.float().square().sum()).item()


# ---- numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_symmetric_int4_keeps_every_groups_extreme_exactly(dtype):
    weight = awkward_weight(64, 256, dtype)
    restored = rtn.dequantize_int4(*rtn.quantize_int4(weight, group_size=64, symmetric=True))
    extremes, restored_extremes = (w.abs().unflatten(1, (-1, 64)).amax(2) for w in (weight, restored))
    assert torch.equal(extremes, restored_extremes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int4_error_is_half_a_step_inside_the_range(symmetric, dtype):
    weight = awkward_weight(64, 256, dtype)
    codes, scales, zeros = rtn.quantize_int4(weight, group_size=64, symmetric=symmetric)
    step = scales.float().abs().repeat_interleave(64, dim=1)
    error = (rtn.dequantize_int4(codes, scales, zeros).float() - weight.float()).abs()
    assert codes.max() == 15 and codes.min() == 0 and torch.isfinite(error).all()
    rounding = 16 * torch.finfo(dtype).eps  # of scale and product, in steps
    inner = (codes > 0) & (codes < 15)
    assert (error <= (0.5 + rounding) * step)[inner].all()
    assert (error <= (1 + rounding) * step).all()  # an end of the range may be clipped


def test_int4_mean_squared_error_is_as_documented():
    weight = normal_weight(2000, 1280)
    groups = weight.float().unflatten(1, (-1, 128))
    absmax_over_7 = (groups.abs().amax(2, keepdim=True) / 7).bfloat16().float()
    naive = (torch.round(groups / absmax_over_7).clamp(-8, 7) * absmax_over_7).flatten(1)
    errors = {
        name: relative_mse(weight, rtn.dequantize_int4(*rtn.quantize_int4(weight, group_size=128, symmetric=s)))
        for name, s in [("symmetric", True), ("asymmetric", False)]
    }
    assert errors["symmetric"] == pytest.approx(0.0107, abs=2e-4)
    assert errors["asymmetric"] == pytest.approx(0.0101, abs=2e-4)
    assert errors["symmetric"] < 0.8 * relative_mse(weight, naive)


def test_codes_are_computed_against_the_stored_scale():
    """A row that reaches 15 only through the rounded scale: bf16 stores (1 - 0) / 15 about 0.2 % too large."""
    weight = torch.linspace(0, 1, 128).repeat(2, 1).bfloat16()
    codes, scales, zeros = rtn.quantize_int4(weight, group_size=128, symmetric=False)
    expected = torch.round(weight.float() / scales.float()).clamp(0, 15).to(torch.uint8)
    against_exact_scale = torch.round(weight.float() * 15).clamp(0, 15).to(torch.uint8)
    assert torch.equal(codes, expected) and not torch.equal(codes, against_exact_scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_error_is_half_a_unit_of_e4m3(dtype):
    weight = awkward_weight(64, 256, dtype)
    codes, scales = rtn.quantize_fp8(weight)
    error = (codes.float() * scales[:, None] - weight.float()).abs()
    assert codes.float().abs().amax(1).max() == 448
    smallest_step = scales[:, None] * 2.0**-9
    assert (error <= torch.maximum(weight.float().abs() * 2.0**-4, smallest_step / 2) * 1.0001).all()


# ---- an fp8 policy's weight


PER_TENSOR, PER_CHANNEL, PER_BLOCK = (64, 256), (1, 256), (128, 128)


@pytest.mark.parametrize("n, k, block", [(64, 256, PER_TENSOR), (64, 256, PER_CHANNEL), (200, 300, PER_BLOCK)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scaled_weight_is_every_code_times_its_own_scale(n, k, block, dtype):
    weight = scaled_weight(n, k, block, dtype)
    dense = weight.dequantize()
    assert dense.shape == weight.shape and dense.dtype == dtype
    for row in range(0, n, 7):
        for column in range(0, k, 11):
            scale = weight.scales[row // block[0], column // block[1]]
            assert dense[row, column] == (weight.codes_NK[row, column].float() * scale).to(dtype)


# ---- Marlin layout, against loops written from the CUDA and Python sources it cites


def repack_like_the_cuda_kernel(codes_NK: torch.Tensor) -> torch.Tensor:
    n, k = codes_NK.shape
    out = torch.zeros(k // 16 * n * 2, dtype=torch.int64)
    for k_tile in range(k // 16):
        for n_tile in range(n // 64):
            for warp in range(4):
                for lane in range(32):
                    column, row = n_tile * 64 + warp * 16 + lane // 4, k_tile * 16 + lane % 4 * 2
                    values = [int(codes_NK[column, row + offset]) for offset in (0, 1, 8, 9)]
                    values += [int(codes_NK[column + 8, row + offset]) for offset in (0, 1, 8, 9)]
                    word = sum(values[source] << 4 * i for i, source in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
                    out[(k_tile * (n // 64) + n_tile) * 128 + lane * 4 + warp] = word
    return out.to(torch.int32).reshape(k // 16, 2 * n)


def permute_like_marlin_permute_scales(scales_GN: torch.Tensor) -> torch.Tensor:
    permutation = [i + 8 * j for i in range(8) for j in range(8)]
    return scales_GN.reshape(-1, 64)[:, permutation].reshape(scales_GN.shape)


def pack_like_marlin_zero_points(zeros_GN: torch.Tensor) -> torch.Tensor:
    permuted = permute_like_marlin_permute_scales(zeros_GN).long()
    interleaved = permuted.reshape(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(zeros_GN.shape)
    return sum(interleaved[:, i::8] << 4 * i for i in range(8)).to(torch.int32)


def random_codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("n, k", [(64, 32), (192, 128)])
def test_codes_layout(n, k):
    codes = random_codes(n, k)
    packed = marlin_layout.pack_codes(codes)
    assert torch.equal(packed, repack_like_the_cuda_kernel(codes))
    assert torch.equal(marlin_layout.unpack_codes(packed), codes)


@pytest.mark.parametrize("n, groups", [(64, 2), (192, 5)])
def test_scales_and_zeros_layout(n, groups):
    scales, zeros = torch.randn(n, groups), random_codes(n, groups)
    packed_scales, packed_zeros = marlin_layout.pack_scales(scales), marlin_layout.pack_zeros(zeros)
    assert torch.equal(packed_scales, permute_like_marlin_permute_scales(scales.T))
    assert torch.equal(packed_zeros, pack_like_marlin_zero_points(zeros.T))
    assert torch.equal(marlin_layout.unpack_scales(packed_scales), scales)
    assert torch.equal(marlin_layout.unpack_zeros(packed_zeros), zeros)


# ---- formats on CPU


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_format_refreshes_in_place_and_applies_its_weight(name, dtype):
    fmt = create_format(name, group_size=32, device=CPU)
    packed = fmt.allocate(96, 128, dtype, CPU)
    addresses = {key: tensor.data_ptr() for key, tensor in packed.tensors().items()}
    weight_a, weight_b = normal_weight(96, 128, dtype, seed=1), normal_weight(96, 128, dtype, seed=2)
    bias, x = normal_weight(1, 96, dtype, seed=3)[0], normal_weight(5, 128, dtype, seed=4)

    snapshots = []
    for weight in (weight_a, weight_b, weight_a):
        fmt.refresh_(packed, weight)
        snapshots.append({key: tensor.clone() for key, tensor in packed.tensors().items()})
        restored = fmt.dequantize(packed)
        assert restored.dtype == dtype and relative_mse(weight, restored) < 0.012
        assert torch.equal(fmt.apply(packed, x, bias), F.linear(x, restored, bias))
        assert torch.equal(fmt.apply(packed, x, None), F.linear(x, restored))

    a, b, a_again = snapshots
    assert all(a[key].view(torch.uint8).equal(a_again[key].view(torch.uint8)) for key in a)
    assert not a["codes"].view(torch.uint8).equal(b["codes"].view(torch.uint8))
    assert addresses == {key: tensor.data_ptr() for key, tensor in packed.tensors().items()}


@pytest.mark.parametrize("name", ["int4", "int4_asym"])
@pytest.mark.parametrize("n, k, block", [(64, 256, PER_TENSOR), (64, 256, PER_CHANNEL), (192, 384, PER_BLOCK)])
def test_int4_of_a_scaled_weight_is_that_of_its_dense_weight(name, n, k, block):
    fmt = create_format(name, group_size=128, device=CPU)
    weight = scaled_weight(n, k, block, torch.bfloat16)
    packed, expected = (fmt.allocate(n, k, weight.dtype, CPU) for _ in range(2))
    fmt.refresh_(packed, weight)
    fmt.refresh_(expected, weight.dequantize())
    for key, tensor in packed.tensors().items():
        assert torch.equal(tensor, expected.tensors()[key])


@pytest.mark.parametrize("name, symmetric", [("int4", True), ("int4_asym", False)])
def test_reference_int4_is_the_quantizer(name, symmetric):
    fmt = create_format(name, group_size=32, device=CPU)
    weight = awkward_weight(64, 128, torch.bfloat16)
    packed = fmt.allocate(64, 128, torch.bfloat16, CPU)
    fmt.refresh_(packed, weight)
    quantized = rtn.quantize_int4(weight, group_size=32, symmetric=symmetric)
    assert torch.equal(fmt.dequantize(packed), rtn.dequantize_int4(*quantized))


def test_bytes():
    n, k = 96, 256
    sizes = {}
    for name in WEIGHT_FORMATS:
        sizes[name] = create_format(name, group_size=128, device=CPU).allocate(n, k, torch.bfloat16, CPU).nbytes
    groups = n * k // 128
    assert sizes == {"int4": n * k // 2 + 2 * groups, "int4_asym": n * k // 2 + 3 * groups, "fp8": n * k + 4 * n}


def test_unsupported_and_unknown_are_refused_with_a_reason():
    assert "group size 128" in create_format("int4", group_size=128, device=CPU).unsupported(64, 192, torch.float32)
    assert create_format("int4", group_size=64, device=CPU).unsupported(64, 192, torch.float32) is None
    with pytest.raises(ValueError, match="int4, int4_asym, fp8"):
        create_format("int3", group_size=128, device=CPU)
    with pytest.raises(ValueError, match="even"):
        create_format("int4", group_size=0, device=CPU)
    with pytest.raises(ValueError, match="cpu and cuda"):
        create_format("int4", group_size=128, device=torch.device("meta"))


@pytest.mark.parametrize("name, capability, advice", [("int4", (7, 5), "serve without"), ("fp8", (8, 6), "use int4")])
def test_old_gpu_is_refused_with_advice(monkeypatch, name, capability, advice):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(ValueError, match=advice):
        create_format(name, group_size=128, device=torch.device("cuda"))


# ---- fused kernels, interpreted on CPU (conftest.py)
#
# The interpreter truncates float32 to bf16 and mishandles rounding to e4m3. So bf16 is interpreted for symmetric
# scales only, which are exact, and fp8 on weights that e4m3 represents; tests/gpu has the rest.

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton (Linux wheels of torch bring it)"
)
divides_by_zero = pytest.mark.filterwarnings("ignore:divide by zero")  # the scale of a row of zeros


@needs_triton
@divides_by_zero
@pytest.mark.parametrize(("symmetric", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
@pytest.mark.parametrize(
    ("group_size", "n", "k"), [(128, 64, 384), (128, 192, 512), (128, 256, 256), (64, 192, 128), (32, 64, 256)]
)
def test_fused_int4_refresh_is_bit_identical_to_reference(symmetric, dtype, group_size, n, k):
    weight = awkward_weight(n, k, dtype)
    weight[15] = -weight[15].abs() * 2e-5  # float16 rounds this scale by a quarter: codes below 0 and above 15
    assert_fused_refresh_is_the_reference(weight, weight, symmetric, group_size)


@needs_triton
@pytest.mark.parametrize(("symmetric", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
@pytest.mark.parametrize(
    ("n", "k", "block"), [(64, 256, PER_TENSOR), (64, 256, PER_CHANNEL), (192, 384, PER_BLOCK), (128, 512, (128, 256))]
)
def test_fused_int4_refresh_reads_scaled_weights(symmetric, dtype, n, k, block):
    weight = scaled_weight(n, k, block, dtype, powers_of_two=dtype == torch.bfloat16)
    assert_fused_refresh_is_the_reference(weight, weight.dequantize(), symmetric, group_size=128)


def assert_fused_refresh_is_the_reference(weight, dense, symmetric, group_size) -> None:
    from er_sglang.quantize.kernels import refresh_int4_marlin_

    (n, k), groups = weight.shape, weight.shape[1] // group_size
    codes = torch.full((k // 16, 2 * n), -1, dtype=torch.int32)
    scales = torch.full((groups, n), torch.nan, dtype=dense.dtype)
    zeros = None if symmetric else torch.full((groups, n // 8), -1, dtype=torch.int32)
    refresh_int4_marlin_(weight, codes, scales, zeros, group_size=group_size)
    expected = rtn.quantize_int4(dense, group_size=group_size, symmetric=symmetric)
    assert torch.equal(codes, marlin_layout.pack_codes(expected.codes_NK))
    assert torch.equal(scales, marlin_layout.pack_scales(expected.scales_NG))
    if not symmetric:
        assert torch.equal(zeros, marlin_layout.pack_zeros(expected.zeros_NG))


@needs_triton
@divides_by_zero
@pytest.mark.parametrize(("n", "k"), [(16, 48), (32, 1040)])
def test_fused_fp8_refresh_is_bit_identical_to_reference(n, k):
    from er_sglang.quantize.kernels import refresh_fp8_

    generator = torch.Generator().manual_seed(5)
    mantissas = torch.randint(8, 16, (n, k), generator=generator) / 8
    weight = (mantissas * 2.0 ** torch.randint(-4, 8, (n, k), generator=generator)).bfloat16()
    weight[:, -1] = -448
    weight *= 2.0 ** torch.arange(-8, n - 8)[:, None]
    weight[3] = 0
    codes = torch.full((n, k), torch.nan).to(torch.float8_e4m3fn)
    scales = torch.full((n,), torch.nan)
    refresh_fp8_(weight, codes, scales)
    expected = rtn.quantize_fp8(weight)
    assert torch.equal(codes.view(torch.uint8), expected.codes_NK.view(torch.uint8))
    assert torch.equal(scales, expected.scales_N)
