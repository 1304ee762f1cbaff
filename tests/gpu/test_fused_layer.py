"""A fused layer computes what its products and norms do one by one; always the same bits, and no launch disturbs another."""

import pytest
import torch

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("needs a Hopper GPU", allow_module_level=True)
pytest.importorskip("sglang", reason="needs SGLang's compiler of kernels")

from er_sglang.bench.gemm import products
from er_sglang.bench.shapes import SHAPES
from er_sglang.drafting import early
from er_sglang.quantize import Packed, create_format
from er_sglang.quantize.base import LayerNorms, LayerProducts
from er_sglang.quantize.blocks import FUSED_ROWS
from er_sglang.quantize.marlin import MarlinInt4

CUDA = torch.device("cuda")
MODELS = ("7b", "14b", "qwen3-8b")
EPS = 1e-6
CLOSE = 6e-3  # relative; bf16 rounds at other places: up to 4e-3 was seen

Operands = tuple[torch.Tensor, torch.Tensor, LayerNorms, torch.Tensor | None]
"""x, residual, norms and bias."""


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(seed)).bfloat16()


def weights(fmt: MarlinInt4, model: str, seed: int) -> dict[str, Packed]:
    packed = {}
    for i, (name, (n, k)) in enumerate(products(SHAPES[model]).items()):
        if name != "lm_head":
            packed[name] = fmt.allocate(n, k, torch.bfloat16, CUDA)
            fmt.refresh_(packed[name], random(n, k, seed=10 * seed + i) * k**-0.5)
    return packed


def layer_products(layer: dict[str, Packed], following: dict[str, Packed]) -> LayerProducts:
    return LayerProducts(
        layer["o"], layer["gate_up"], layer["down"], following["qkv"], following["o"], following["gate_up"]
    )


@pytest.fixture(scope="module", params=MODELS)
def layers(request) -> tuple[MarlinInt4, LayerProducts, LayerProducts]:
    """The format, and two layers' products, with weights of their own, behind each other."""
    fmt = create_format("int4", group_size=128, device=CUDA)
    one, other = weights(fmt, request.param, 1), weights(fmt, request.param, 2)
    both = layer_products(one, other), layer_products(other, one)
    assert [fmt.fused_rows(layer) for layer in both] == [FUSED_ROWS, FUSED_ROWS]
    return fmt, *both


def operands(layer: LayerProducts, rows: int, with_bias: bool, seed: int = 0) -> Operands:
    hidden = layer.o.n
    first, second = (1 + 0.2 * random(2, hidden, seed=seed)).bfloat16()
    return (
        random(rows, layer.o.k, seed=seed + 1),
        random(rows, hidden, seed=seed + 2),
        LayerNorms(first, second, EPS),
        random(1, layer.qkv.n, seed=seed + 3)[0] if with_bias else None,
    )


def run(
    fmt: MarlinInt4,
    layer: LayerProducts,
    x: torch.Tensor,
    residual: torch.Tensor,
    norms: LayerNorms,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """qkv and the new residual; the one given stays."""
    residual = residual.clone()
    return fmt.apply_layer(layer, x, residual, norms, bias), residual


def one_by_one(
    fmt: MarlinInt4,
    layer: LayerProducts,
    x: torch.Tensor,
    residual: torch.Tensor,
    norms: LayerNorms,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual.clone()
    x = fmt.apply(layer.o, x, None)
    early.add_rms_norm_(x, residual, norms.first_H, EPS)
    x = fmt.apply(layer.down, fmt.apply_gated(layer.gate_up, x, None), None)
    early.add_rms_norm_(x, residual, norms.second_H, EPS)
    return fmt.apply(layer.qkv, x, bias), residual


def equal(results: tuple[torch.Tensor, torch.Tensor], others: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(map(torch.equal, results, others))


of_all_rows = pytest.mark.parametrize("rows", range(1, FUSED_ROWS + 1))


@of_all_rows
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_is_its_products_and_norms(layers, rows, with_bias):
    fmt, *both = layers
    for layer in both:
        given = operands(layer, rows, with_bias)
        for actual, expected in zip(run(fmt, layer, *given), one_by_one(fmt, layer, *given), strict=True):
            assert ((actual.float() - expected.float()).norm() / expected.float().norm()).item() < CLOSE


@of_all_rows
def test_rows_of_x_may_lie_apart(layers, rows):
    """The attention's output may be part of a wider tensor."""
    fmt, layer, _ = layers
    x, *others = operands(layer, rows, True)
    wider = torch.full((rows, layer.o.k + 64), torch.nan, dtype=x.dtype, device=CUDA)
    wider[:, : layer.o.k] = x
    assert equal(run(fmt, layer, wider[:, : layer.o.k], *others), run(fmt, layer, x, *others))


@of_all_rows
def test_numbers_that_are_none_are_handed_on(layers, rows):
    """What blocks have not sent yet are the bits of a NaN, which may be in x, too."""
    fmt, layer, _ = layers
    x, residual, *others = operands(layer, rows, True)
    x.view(torch.int16)[-1], residual.view(torch.int16)[-1] = -1, -1
    for result in run(fmt, layer, x, residual, *others):
        assert result[-1].isnan().all() and result[:-1].isfinite().all()


@of_all_rows
def test_launches_take_back_what_blocks_handed_each_other(layers, rows):
    """But what the last one handed on to more than one block, which the next one takes back."""
    fmt, layer, _ = layers
    given = operands(layer, rows, True)
    run(fmt, layer, *given)
    (scratch,) = fmt._fused_layer._scratch.values()
    outputs = [layer.o.n // 64, layer.gate_up.n // 128, layer.down.n // 64, layer.qkv.n // 64]
    handed_on = 2 * FUSED_ROWS * 33 * sum(outputs)
    assert (scratch[4 + handed_on :] == -1).all()
    assert (scratch[4 : 4 + handed_on].view(2, -1) == -1).all(dim=1).tolist() in ([True, False], [False, True])


@of_all_rows
def test_ten_launches_give_the_same_bits(layers, rows):
    fmt, layer, _ = layers
    given = operands(layer, rows, True)
    first, *others = [run(fmt, layer, *given) for _ in range(10)]
    assert all(equal(first, other) for other in others)


@of_all_rows
def test_a_graph_gives_an_eager_launchs_bits(layers, rows):
    """At every replay, with eager launches in between."""
    fmt, layer, _ = layers
    given = operands(layer, rows, True)
    eager = run(fmt, layer, *given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run(fmt, layer, *given)
    for _ in range(3):
        for tensor in replayed:
            tensor.fill_(torch.nan)
        graph.replay()
        assert equal(replayed, eager)
        assert equal(run(fmt, layer, *given), eager)


def test_launches_do_not_disturb_each_other(layers):
    """Two layers, now these rows, now those, all through one place for sums: each result is that of the launch alone."""
    fmt, *both = layers
    cases = [
        (layer, operands(layer, rows, with_bias, seed=100 * rows))
        for rows, with_bias in [(1, True), (8, False), (2, True), (5, False), (4, True), (1, False)]
        for layer in both
    ]
    alone = []
    for layer, given in cases:
        torch.cuda.synchronize()
        alone.append(run(fmt, layer, *given))
    torch.cuda.synchronize()
    assert len(fmt._fused_layer._scratch) == 1
    for _ in range(10):
        together = [run(fmt, layer, *given) for layer, given in cases]
        assert all(map(equal, together, alone))


@of_all_rows
def test_early_starts_overtake_nothing(layers, rows):
    """Chains and small kernels in turn, captured with early starts, compute what they compute step by step."""
    fmt, *both = layers
    x, start, norms, bias = operands(both[0], rows, True)
    ones = torch.ones(both[0].qkv.n, dtype=x.dtype, device=CUDA)

    def launches(after_each=lambda: None) -> tuple[torch.Tensor, torch.Tensor]:
        y, residual = x, start.clone()
        for layer in both * 4:
            y = fmt.apply_layer(layer, y[:, : layer.o.k], residual, norms, bias)
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


def test_what_cannot_be_fused():
    """Layers that are too small, other weights, and a following layer of another shape."""

    def rows(name: str, group_size: int, dtype: torch.dtype, next_n: int = 5120, hidden: int = 5120) -> int:
        def packed(n: int, k: int) -> Packed:  # no more than is looked at
            return Packed(n, k, dtype, codes=torch.empty(0, device=CUDA), scales=torch.empty(0, device=CUDA))

        return create_format(name, group_size=group_size, device=CUDA).fused_rows(
            LayerProducts(
                o=packed(hidden, hidden),
                gate_up=packed(27648, hidden),
                down=packed(hidden, 13824),
                qkv=packed(7168, hidden),
                next_o=packed(next_n, hidden),
                next_gate_up=packed(27648, hidden),
            )
        )

    assert rows("int4", 128, torch.bfloat16) == FUSED_ROWS
    assert rows("int4_asym", 128, torch.bfloat16) == 0
    assert rows("int4", 64, torch.bfloat16) == 0
    assert rows("int4", 128, torch.float16) == 0
    assert rows("int4", 128, torch.bfloat16, next_n=2560) == 0
    assert rows("int4", 128, torch.bfloat16, next_n=896, hidden=896) == 0
