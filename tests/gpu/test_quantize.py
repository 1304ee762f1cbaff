"""Weight formats on CUDA: bit-identical to the reference, right products, stable under graphs, fast to refresh.

Run with -s to see times and bytes.
"""

import math
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("sglang", reason="needs SGLang's Marlin and fp8 kernels")

from er_sglang.bench.gemm import all_shapes
from er_sglang.config import WEIGHT_FORMATS
from er_sglang.drafting import early
from er_sglang.quantize import Format, Packed, create_format, marlin_layout, rtn
from er_sglang.quantize.blocks import MAX_SPLITS, WGMMA_BLOCK_N, Wave
from er_sglang.quantize.kernels import refresh_int4_marlin_
from er_sglang.quantize.marlin import MarlinInt4
from er_sglang.quantize.scaled import ScaledWeight

CUDA = torch.device("cuda")
INT4 = ("int4", "int4_asym")

# name: (layers, {linear: (n, k)}, vocabulary)
MODELS = {
    "7B": (28, {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}, 152064),
    "14B": (48, {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (27648, 5120), "down": (5120, 13824)}, 152064),
    "32B": (64, {"qkv": (7168, 5120), "o": (5120, 5120), "gate_up": (55296, 5120), "down": (5120, 27648)}, 152064),
}
REFRESH_LIMIT_S = {"7B": 0.020, "14B": 0.040, "32B": math.inf}


@pytest.fixture(params=WEIGHT_FORMATS)
def fmt(request) -> Format:
    if request.param == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    return create_format(request.param, group_size=128, device=CUDA)


def random_weight(n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return (torch.randn(n, k, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed)) * 0.02).to(dtype)


def awkward_weight(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    weight = random_weight(n, k, dtype)
    weight[1] = 0
    weight[3] = weight[3].abs()
    weight[5] = -weight[5].abs()
    weight[7] = 0.5
    weight[9] *= 1000
    weight[11] *= 1e-4 if dtype == torch.float16 else 1e-37  # subnormal scales
    weight[13, ::7] = 3
    weight[15] = -weight[15].abs() * 2e-5  # float16 rounds this scale by a quarter: codes below 0 and above 15
    return weight


def scaled_weight(n: int, k: int, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> ScaledWeight:
    """Any code but NaN, and scales of either sign."""
    generator = torch.Generator(CUDA).manual_seed(n + k)
    codes = torch.randint(0, 256, (n, k), device=CUDA, dtype=torch.uint8, generator=generator)
    codes[codes % 128 == 127] = 0
    scales = torch.randn(-(-n // block[0]), -(-k // block[1]), device=CUDA, generator=generator) * 0.01
    return ScaledWeight(codes.view(torch.float8_e4m3fn), scales, block, dtype)


def filled(fmt: Format, weight: torch.Tensor | ScaledWeight) -> Packed:
    packed = fmt.allocate(*weight.shape, weight.dtype, CUDA)
    fmt.refresh_(packed, weight)
    return packed


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def bytes_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# ---- bit-identity


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k, group_size", [(64, 256, 128), (192, 384, 64), (256, 512, 32), (4608, 3584, 128)])
def test_int4_refresh_is_the_reference_quantizer_in_sglangs_marlin_layout(symmetric, dtype, n, k, group_size):
    from sglang.jit_kernel.gptq_marlin_repack import gptq_marlin_repack
    from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales, marlin_zero_points

    weight = awkward_weight(n, k, dtype)
    groups = k // group_size
    codes = torch.full((k // 16, 2 * n), -1, dtype=torch.int32, device=CUDA)
    scales = torch.full((groups, n), torch.nan, dtype=dtype, device=CUDA)
    zeros = None if symmetric else torch.full((groups, n // 8), -1, dtype=torch.int32, device=CUDA)
    refresh_int4_marlin_(weight, codes, scales, zeros, group_size=group_size)

    expected = rtn.quantize_int4(weight, group_size=group_size, symmetric=symmetric)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=CUDA)[None, :, None]
    gptq_codes = (expected.codes_NK.T.reshape(k // 8, 8, n).int() << shifts).sum(1, dtype=torch.int32)
    no_permutation = torch.empty(0, dtype=torch.int32, device=CUDA)
    assert bytes_equal(scales, marlin_permute_scales(expected.scales_NG.T.contiguous(), k, n, group_size))
    assert torch.equal(codes, gptq_marlin_repack(gptq_codes, no_permutation, k, n, 4))
    assert torch.equal(codes, marlin_layout.pack_codes(expected.codes_NK))
    if not symmetric:
        zeros_GN = expected.zeros_NG.T.contiguous().int()
        assert torch.equal(zeros.cpu(), marlin_zero_points(zeros_GN.cpu(), groups, n, 4))

    on_cpu = rtn.quantize_int4(weight.cpu(), group_size=group_size, symmetric=symmetric)
    assert torch.equal(expected.codes_NK.cpu(), on_cpu.codes_NK)
    assert bytes_equal(expected.scales_NG.cpu(), on_cpu.scales_NG)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", [(64, 256), (192, 384), (4608, 3584)])
@pytest.mark.parametrize("scales", ["tensor", "channel", "block"])
def test_int4_refresh_of_a_scaled_weight_is_that_of_its_dense_weight(symmetric, dtype, n, k, scales):
    weight = scaled_weight(n, k, {"tensor": (n, k), "channel": (1, k), "block": (128, 128)}[scales], dtype)

    def refreshed(weight: torch.Tensor | ScaledWeight) -> list[torch.Tensor]:
        codes = torch.full((k // 16, 2 * n), -1, dtype=torch.int32, device=CUDA)
        scales_GN = torch.full((k // 128, n), torch.nan, dtype=dtype, device=CUDA)
        zeros = None if symmetric else torch.full((k // 128, n // 8), -1, dtype=torch.int32, device=CUDA)
        refresh_int4_marlin_(weight, codes, scales_GN, zeros, group_size=128)
        return [codes, scales_GN] if symmetric else [codes, scales_GN, zeros]

    assert all(map(bytes_equal, refreshed(weight), refreshed(weight.dequantize())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, k", [(32, 48), (100, 3584), (64, 27648)])
def test_fp8_refresh_is_the_reference_quantizer(dtype, n, k):
    weight = awkward_weight(n, k, dtype)
    packed = filled(create_format("fp8", group_size=128, device=CUDA), weight)
    expected = rtn.quantize_fp8(weight)
    assert torch.equal(packed.scales, expected.scales_N)
    assert bytes_equal(packed.codes, expected.codes_NK)


# ---- products


@pytest.mark.parametrize("m", [1, 7, 9, 16, 17, 24, 32, 33, 40, 65, 96, 113, 128, 130])
@pytest.mark.parametrize("n, k", [(192, 384), (4608, 3584), (5120, 13824), (152064, 5120)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_apply_is_the_product_with_the_dequantized_weight(fmt, m, n, k, with_bias):
    weight, x = random_weight(n, k), random_weight(m, k, seed=1) * 50
    bias = random_weight(1, n, seed=2)[0] if with_bias else None
    packed = filled(fmt, weight)
    assert relative_error(fmt.dequantize(packed), weight) < 0.12
    x_used = x.float()
    if packed.codes.dtype == torch.float8_e4m3fn:
        x_used = rtn.dequantize_fp8(*rtn.quantize_fp8(x), torch.float32)
    expected = x_used @ fmt.dequantize(packed).float().T
    if with_bias:
        expected += bias.float()
    assert relative_error(fmt.apply(packed, x, bias), expected) < 0.006


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_groups_and_dtypes(name, group_size, dtype):
    fmt = create_format(name, group_size=group_size, device=CUDA)
    packed = filled(fmt, random_weight(512, 1024, dtype))
    for m in (8, 16, *range(24, 137, 8)):
        x = random_weight(m, 1024 + 8, dtype, seed=m)[:, :1024]  # rows apart
        assert relative_error(fmt.apply(packed, x, None), x.float() @ fmt.dequantize(packed).float().T) < 0.006


@pytest.mark.parametrize("name", INT4)
def test_locks_are_left_zero(name):
    fmt = create_format(name, group_size=128, device=CUDA)
    packed, x = filled(fmt, random_weight(1024, 8192)), random_weight(136, 8192, seed=1)  # rows for Marlin
    fmt.apply(packed, x, None)
    assert not fmt._locks.any()


@pytest.mark.parametrize("name", INT4)
def test_unsupported_shapes_have_reasons(name):
    fmt = create_format(name, group_size=128, device=CUDA)
    assert fmt.unsupported(4608, 3584, torch.bfloat16) is None
    assert "64" in fmt.unsupported(4600, 3584, torch.bfloat16)
    assert "128" in fmt.unsupported(4608, 3500, torch.bfloat16)
    assert "single group" in fmt.unsupported(4608, 128, torch.bfloat16)
    assert "float32" in fmt.unsupported(4608, 3584, torch.float32)
    with pytest.raises(ValueError, match="use 128"):
        create_format(name, group_size=100, device=CUDA)


# ---- our kernels for Hopper


on_hopper = pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="our kernels are for Hopper")


@on_hopper
@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("m", [1, 9, 33, 64, 128])
@pytest.mark.parametrize("n, k", [(192, 1024), (4608, 3584)])
def test_every_way_to_share_out_is_the_product(name, m, n, k):
    """Any number of splits, in one wave or two, by rows that are NaN before: all of y is written; and twice the same
    bits."""
    fmt = create_format(name, group_size=128, device=CUDA)
    packed, x, bias = filled(fmt, random_weight(n, k)), random_weight(m, k, seed=1) * 50, random_weight(1, n, seed=2)[0]
    expected = x.float() @ fmt.dequantize(packed).float().T + bias.float()
    columns = -(-n // WGMMA_BLOCK_N)
    shapes = list(all_shapes(m, n, k))
    assert {(Wave(columns, splits),) for splits in range(1, MAX_SPLITS + 1)} <= set(shapes)
    shapes += [(Wave(columns - 1, 2), Wave(1, 5))] * (columns > 1)
    for shape in shapes:
        y, again = torch.full((2, m, n), torch.nan, dtype=torch.bfloat16, device=CUDA)
        fmt._hopper_gemm[torch.bfloat16](packed, x, bias, y, shape)
        fmt._hopper_gemm[torch.bfloat16](packed, x, bias, again, shape)
        assert relative_error(y, expected) < 0.006
        assert torch.equal(y, again)


@on_hopper
@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("m", [1, 5, 8, 9, 16, 33, 128])
@pytest.mark.parametrize(
    "n, k", [(128, 1024), (384, 1024), (37888, 3584)]
)  # half a block of gate, one and a half, two waves
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_gated_product_is_the_product_and_its_activation_bit_for_bit(name, m, n, k, with_bias):
    fmt = create_format(name, group_size=128, device=CUDA)
    packed, x = filled(fmt, random_weight(n, k)), random_weight(m, k, seed=1) * 50
    bias = random_weight(1, n, seed=2)[0] if with_bias else None
    assert fmt.gates(n)
    ours = fmt._hopper_gemm[torch.bfloat16]
    y = torch.empty(m, n, dtype=torch.bfloat16, device=CUDA)
    for shape in all_shapes(m, n, k):
        gated = torch.full((m, n // 2), torch.nan, dtype=torch.bfloat16, device=CUDA)
        ours(packed, x, bias, y, shape)
        ours(packed, x, bias, gated, shape, gated=True)
        assert torch.equal(gated, early.silu_and_mul(y))
    # Of two waves, the second one's columns are others, so sums are rounded otherwise.
    assert relative_error(fmt.apply_gated(packed, x, bias), early.silu_and_mul(fmt.apply(packed, x, bias))) < 0.003


def test_gates_of_more_rows_than_our_kernels_take():
    fmt = create_format("int4", group_size=128, device=CUDA)
    packed, x = filled(fmt, random_weight(384, 1024)), random_weight(130, 1024, seed=1) * 50
    gate, up = fmt.apply(packed, x, None).float().chunk(2, dim=1)
    assert relative_error(fmt.apply_gated(packed, x, None), torch.nn.functional.silu(gate) * up) < 0.003


# ---- graphs


@pytest.mark.parametrize("m", [16, 33, 128])
def test_graph_replays_across_refreshes(fmt, m):
    """A -> B -> A under one captured graph: same addresses, and every replay equals the eager call bit for bit."""
    n, k = 4608, 3584
    weights = {"A": random_weight(n, k, seed=1), "B": random_weight(n, k, seed=2)}
    x, bias = random_weight(m, k, seed=3), random_weight(1, n, seed=4)[0]
    packed = filled(fmt, weights["A"])
    addresses = {name: tensor.data_ptr() for name, tensor in packed.tensors().items()}

    with torch.cuda.stream(torch.cuda.Stream()):
        fmt.apply(packed, x, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fmt.apply(packed, x, bias)

    outputs = []
    for name in "ABA":
        fmt.refresh_(packed, weights[name])
        graph.replay()
        assert torch.equal(y, fmt.apply(packed, x, bias))
        outputs.append(y.clone())
    a, b, a_again = outputs
    assert torch.equal(a, a_again) and not torch.equal(a, b)
    assert addresses == {name: tensor.data_ptr() for name, tensor in packed.tensors().items()}


# ---- refresh time


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes per second, reads and writes together, of a device-to-device copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / best_of(5, lambda: target.copy_(source))


def best_of(repeats: int, run) -> float:
    """Wall seconds including launches, as a trainer waits for them."""
    times_s = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start)
    return min(times_s)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("policy", ["bf16", "fp8 by channels", "fp8 by blocks"])
def test_refresh_time_and_memory(fmt, model, policy, copy_bandwidth):
    """All linears and lm_head of a model; one layer's weights stand for all (each exceeds the L2 cache)."""
    if policy != "bf16" and not isinstance(fmt, MarlinInt4):
        pytest.skip("an fp8 policy is drafted for in int4")
    layers, linears, vocabulary = MODELS[model]
    hidden = linears["qkv"][1]

    def linear(n: int, k: int) -> torch.Tensor | ScaledWeight:
        if policy == "bf16":
            return random_weight(n, k)
        return scaled_weight(n, k, (1, k) if policy == "fp8 by channels" else (128, 128))

    layer = [(weight, filled(fmt, weight)) for weight in (linear(*shape) for shape in linears.values())]
    head = [(weight, filled(fmt, weight)) for weight in [random_weight(vocabulary, hidden)]]
    work = layer * layers + head

    def refresh_all():
        for weight, packed in work:
            fmt.refresh_(packed, weight)

    refresh_all()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    seconds = best_of(5, refresh_all)
    extra_bytes = torch.cuda.max_memory_allocated() - before_bytes

    read_bytes = sum(getattr(weight, "codes_NK", weight).nbytes for weight, _ in work)
    written_bytes = sum(packed.nbytes for _, packed in work)
    weights = sum(weight.shape.numel() for weight, _ in work)
    floor_s = (read_bytes + written_bytes) / copy_bandwidth
    print(
        f"\n{type(fmt).__name__} {'' if getattr(fmt, 'symmetric', True) else 'asymmetric '}{model} of {policy}: "
        f"refresh {seconds * 1e3:.1f} ms, floor {floor_s * 1e3:.1f} ms at {copy_bandwidth / 1e12:.2f} TB/s copy; "
        f"read {read_bytes / 1e9:.1f} GB, written {written_bytes / 1e9:.1f} GB, "
        f"{8 * written_bytes / weights:.3f} bits a weight, {len(work)} launches"
    )
    assert extra_bytes == 0
    assert seconds < REFRESH_LIMIT_S[model]
