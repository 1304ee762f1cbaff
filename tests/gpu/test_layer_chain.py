"""A layer's chain computes what its products and norms do one by one; always the same bits, and no launch disturbs another."""

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("sglang", reason="needs SGLang's compiler of kernels")

from er_sglang.bench.gemm import products
from er_sglang.bench.shapes import SHAPES
from er_sglang.drafting import early
from er_sglang.quantize import Packed, create_format
from er_sglang.quantize.base import ChainNorms, ChainProducts
from er_sglang.quantize.blocks import CHAIN_ROWS
from er_sglang.quantize.marlin import MarlinInt4

CUDA = torch.device("cuda")
MODELS = ("7b", "14b", "qwen3-8b")
EPS = 1e-6
CLOSE = 6e-3  # relative; bf16 rounds at other places: up to 4e-3 was seen

Operands = tuple[torch.Tensor, torch.Tensor, ChainNorms, torch.Tensor | None]
"""x, residual, norms and bias."""


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed)).bfloat16()


def layer(fmt: MarlinInt4, model: str, seed: int) -> dict[str, Packed]:
    packed = {}
    for i, (name, (n, k)) in enumerate(products(SHAPES[model]).items()):
        if name != "lm_head":
            packed[name] = fmt.allocate(n, k, torch.bfloat16, CUDA)
            fmt.refresh_(packed[name], random(n, k, seed=10 * seed + i) * k**-0.5)
    return packed


def chained(layer: dict[str, Packed], following: dict[str, Packed]) -> ChainProducts:
    return ChainProducts(
        layer["o"], layer["gate_up"], layer["down"], following["qkv"], following["o"], following["gate_up"]
    )


@pytest.fixture(scope="module", params=MODELS)
def chains(request) -> tuple[MarlinInt4, ChainProducts, ChainProducts]:
    """The format, and chains of two layers with weights of their own, behind each other."""
    fmt = create_format("int4", group_size=128, device=CUDA)
    one, other = layer(fmt, request.param, 1), layer(fmt, request.param, 2)
    both = chained(one, other), chained(other, one)
    assert [fmt.chain_rows(chain) for chain in both] == [CHAIN_ROWS, CHAIN_ROWS]
    return fmt, *both


def operands(chain: ChainProducts, rows: int, with_bias: bool, seed: int = 0) -> Operands:
    hidden = chain.o.n
    first, second = (1 + 0.2 * random(2, hidden, seed=seed)).bfloat16()
    return (
        random(rows, chain.o.k, seed=seed + 1),
        random(rows, hidden, seed=seed + 2),
        ChainNorms(first, second, EPS),
        random(1, chain.qkv.n, seed=seed + 3)[0] if with_bias else None,
    )


def run(
    fmt: MarlinInt4,
    chain: ChainProducts,
    x: torch.Tensor,
    residual: torch.Tensor,
    norms: ChainNorms,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv and the new residual; the one given stays."""
    residual = residual.clone()
    return fmt.chain(chain, x, residual, norms, bias), residual


def one_by_one(
    fmt: MarlinInt4,
    chain: ChainProducts,
    x: torch.Tensor,
    residual: torch.Tensor,
    norms: ChainNorms,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual.clone()
    x = fmt.apply(chain.o, x, None)
    early.add_rms_norm_(x, residual, norms.first_H, EPS)
    x = fmt.apply(chain.down, fmt.apply_gated(chain.gate_up, x, None), None)
    early.add_rms_norm_(x, residual, norms.second_H, EPS)
    return fmt.apply(chain.qkv, x, bias), residual


def equal(results: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(map(torch.equal, results, others))


of_all_rows = pytest.mark.parametrize("rows", range(1, CHAIN_ROWS + 1))


@of_all_rows
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_chain_is_its_products_and_norms(chains, rows, with_bias):
    fmt, *both = chains
    for chain in both:
        given = operands(chain, rows, with_bias)
        for actual, expected in zip(run(fmt, chain, *given), one_by_one(fmt, chain, *given), strict=True):
            assert ((actual.float() - expected.float()).norm() / expected.float().norm()).item() < CLOSE


@of_all_rows
def test_rows_of_x_may_lie_apart(chains, rows):
    """The attention's output may be part of a wider tensor."""
    fmt, chain, _ = chains
    x, *others = operands(chain, rows, True)
    wider = torch.full((rows, chain.o.k + 64), torch.nan, dtype=x.dtype, device=CUDA)
    wider[:, : chain.o.k] = x
    assert equal(run(fmt, chain, wider[:, : chain.o.k], *others), run(fmt, chain, x, *others))


@of_all_rows
def test_ten_launches_give_the_same_bits(chains, rows):
    fmt, chain, _ = chains
    given = operands(chain, rows, True)
    first, *others = [run(fmt, chain, *given) for _ in range(10)]
    assert all(equal(first, other) for other in others)


@of_all_rows
def test_a_graph_gives_an_eager_launchs_bits(chains, rows):
    """At every replay, with eager launches in between."""
    fmt, chain, _ = chains
    given = operands(chain, rows, True)
    eager = run(fmt, chain, *given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(fmt, chain, *given)
    for _ in range(3):
        for tensor in replayed:
            tensor.fill_(torch.nan)
        graph.replay()
        assert equal(replayed, eager)
        assert equal(run(fmt, chain, *given), eager)


def test_launches_do_not_disturb_each_other(chains):
    """Two layers, now these rows, now those, all through one place for sums: each result is that of the launch alone."""
    fmt, *both = chains
    cases = [
        (chain, operands(chain, rows, with_bias, seed=100 * rows))
        for rows, with_bias in [(1, True), (4, False), (2, True), (3, False), (4, True), (1, False)]
        for chain in both
    ]
    alone = []
    for chain, given in cases:
        torch.cuda.synchronize()
        alone.append(run(fmt, chain, *given))
    torch.cuda.synchronize()
    assert len(fmt._layer_chain._scratch) == 1
    for _ in range(10):
        together = [run(fmt, chain, *given) for chain, given in cases]
        assert all(map(equal, together, alone))


@of_all_rows
def test_early_starts_overtake_nothing(chains, rows):
    """Chains and small kernels in turn, captured with early starts, compute what they compute step by step."""
    fmt, *both = chains
    x, start, norms, bias = operands(both[0], rows, True)
    ones = torch.ones(both[0].qkv.n, dtype=x.dtype, device=CUDA)

    def launches(after_each=lambda: None) -> tuple[torch.Tensor, torch.Tensor]:
        y, residual = x, start.clone()
        for chain in both * 4:
            y = fmt.chain(chain, y[:, : chain.o.k], residual, norms, bias)
            after_each()
            y = early.rms_norm(y, ones, EPS)
            after_each()
        return y, residual

    expected = launches(torch.cuda.synchronize)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = launches()
    for _ in range(5):
        graph.replay()
        assert equal(actual, expected)


def test_what_cannot_be_chained():
    """Layers that are too small, other weights, and a following layer of another shape."""

    def rows(name: str, group_size: int, dtype: torch.dtype, next_n: int = 5120, hidden: int = 5120) -> int:
        def packed(n: int, k: int) -> Packed:  # no more than is looked at
            return Packed(n, k, dtype, codes=torch.empty(0, device=CUDA), scales=torch.empty(0, device=CUDA))

        return create_format(name, group_size=group_size, device=CUDA).chain_rows(
            ChainProducts(
                o=packed(hidden, hidden),
                gate_up=packed(27648, hidden),
                down=packed(hidden, 13824),
                qkv=packed(7168, hidden),
                next_o=packed(next_n, hidden),
                next_gate_up=packed(27648, hidden),
            )
        )

    assert rows("int4", 128, torch.bfloat16) == CHAIN_ROWS
    assert rows("int4_asym", 128, torch.bfloat16) == 0
    assert rows("int4", 64, torch.bfloat16) == 0
    assert rows("int4", 128, torch.float16) == 0
    assert rows("int4", 128, torch.bfloat16, next_n=2560) == 0
    assert rows("int4", 128, torch.bfloat16, next_n=896, hidden=896) == 0
