"""The draft's small kernels: what a float32 reference computes, and no reader overtakes its writer."""

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("sglang", reason="needs SGLang's compiler of kernels")

from er_sglang.drafting import early
from er_sglang.quantize import create_format

CUDA = torch.device("cuda")
ROWS = (1, 3, 16, 33, 128)
EPS = 1e-6
UNIT_ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}

of_both_dtypes = pytest.mark.parametrize("dtype", early.DTYPES)


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed)).to(dtype)


def assert_rounded(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """``actual`` is ``expected``, a float32 result, rounded to its dtype (within float32's own error)."""
    tolerance = UNIT_ROUNDOFF[actual.dtype] * 1.01
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=4e-6)


def assert_rounded_twice(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """``actual`` is ``expected``, whose rounded intermediate results may differ by a bit here and there."""
    assert (actual.float() - expected).norm() < UNIT_ROUNDOFF[actual.dtype] * expected.norm()


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.float()


@of_both_dtypes
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("k", [64, 264, 3584, 5120, 8192])
def test_norms(dtype, m, k):
    x, residual, weight = (random(rows, k, dtype=dtype, seed=seed) for seed, rows in enumerate((m, m, 1)))
    weight = weight[0]
    assert_rounded(early.rms_norm(x, weight, EPS), normed(x.float(), weight))
    total = x.float() + residual.float()
    early.add_rms_norm_(x, residual, weight, EPS)
    assert torch.equal(residual, total.to(dtype))
    assert_rounded(x, normed(total, weight))


@of_both_dtypes
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("k", [16, 1040, 27648])
def test_silu_and_mul(dtype, m, k):
    x = random(m, k, dtype=dtype) * 4
    gate, up = x.float().chunk(2, dim=1)
    assert_rounded(early.silu_and_mul(x), torch.nn.functional.silu(gate) * up)


@of_both_dtypes
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("heads_q, heads_k, head_dim", [(40, 8, 128), (7, 1, 64), (5, 5, 128)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rope_and_store(dtype, m, heads_q, heads_k, head_dim, with_norms):
    qkv = random(m, (heads_q + 2 * heads_k) * head_dim, dtype=dtype)
    before = qkv.float().view(m, -1, head_dim)
    q, k, v = (
        part.view(m, -1, head_dim) for part in qkv.split([h * head_dim for h in (heads_q, heads_k, heads_k)], dim=1)
    )
    caches = [random(200, heads_k, head_dim, dtype=dtype, seed=seed) for seed in (1, 2)]
    expected_caches = [cache.clone() for cache in caches]
    table = random(1000, head_dim, dtype=torch.float32, seed=3)
    positions, slots = torch.randint(1000, (m,), device=CUDA), torch.randperm(200, device=CUDA)[:m]
    q_weight, k_weight = random(2, head_dim, dtype=dtype, seed=4)
    norms = early.HeadNorms(q_weight, k_weight, EPS) if with_norms else None

    rotated_q = early.rope_store_(q, k, v, *caches, table, positions, slots, norms)

    cos, sin = table[positions].unsqueeze(1).chunk(2, dim=2)
    heads = before[:, : heads_q + heads_k]
    if with_norms:
        weight = torch.cat([q_weight.expand(heads_q, -1), k_weight.expand(heads_k, -1)])
        heads = normed(heads, weight).to(dtype).float()
    x, y = heads.chunk(2, dim=2)
    rotated = torch.cat([x * cos - y * sin, x * sin + y * cos], dim=2)
    assert_right = assert_rounded_twice if with_norms else assert_rounded
    assert_right(rotated_q, rotated[:, :heads_q])
    assert torch.equal(qkv.float().view(m, -1, head_dim), before)
    assert_right(caches[0][slots], rotated[:, heads_q:])
    expected_caches[0][slots] = caches[0][slots]
    expected_caches[1][slots] = v
    for cache, expected in zip(caches, expected_caches):
        assert torch.equal(cache, expected), "a slot that is no token's was written"


@pytest.mark.parametrize("m", [1, 16, 17, 64, 128])
def test_early_starts_overtake_nothing(m):
    """A chain of products and small kernels, captured with early starts, computes what it computes step by step."""
    dtype, hidden, layers = torch.bfloat16, 1024, 6
    fmt = create_format("int4", group_size=128, device=CUDA)
    weights = []
    for seed in range(2 * layers):
        n, k = (4 * hidden, hidden) if seed % 2 == 0 else (hidden, 2 * hidden)
        weights.append(fmt.allocate(n, k, dtype, CUDA))
        fmt.refresh_(weights[-1], random(n, k, dtype=dtype, seed=seed) * 0.03)
    norm_weight = random(hidden, dtype=dtype)
    start_x, start_residual = random(m, hidden, dtype=dtype, seed=50), random(m, hidden, dtype=dtype, seed=51)

    def run(after_each=lambda: None) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = start_x.clone(), start_residual.clone()
        for gate_up, down in zip(weights[::2], weights[1::2]):
            early.add_rms_norm_(x, residual, norm_weight, EPS)
            after_each()
            x = fmt.apply(gate_up, x, None)
            after_each()
            x = early.silu_and_mul(x)
            after_each()
            x = fmt.apply(down, x, None)
            after_each()
        return x, residual

    expected = run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    for _ in range(50):
        for tensor in actual:
            tensor.fill_(torch.nan)
        graph.replay()
        for a, e in zip(actual, expected):
            assert torch.equal(a, e)
