"""What the launcher of a fused layer hands to the kernel, which is a stand-in."""

from types import SimpleNamespace

import pytest
import torch

from er_sglang.bench.gemm import products
from er_sglang.bench.shapes import SHAPES
from er_sglang.quantize import fused_layer
from er_sglang.quantize.base import LayerNorms, LayerProducts, Packed
from er_sglang.quantize.blocks import FUSED_ROWS

SHAPE = {name: nk for name, nk in products(SHAPES["14b"]).items() if name != "lm_head"}


def packed(n: int, k: int) -> Packed:
    return Packed(n, k, torch.bfloat16, *torch.empty(2, 1).unbind())  # tensors that are told apart by identity


def products(shape: dict[str, tuple[int, int]] = SHAPE) -> LayerProducts:
    return LayerProducts(*(packed(*shape[name]) for name in ("o", "gate_up", "down", "qkv", "o", "gate_up")))


@pytest.fixture
def launcher(monkeypatch):
    launches = []
    module = SimpleNamespace(run=lambda *arguments: launches.append(arguments))
    monkeypatch.setattr(fused_layer, "fused_layer_module", lambda: module)
    card = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    launcher = fused_layer.FusedLayer(device=torch.device("cpu"))
    launcher.launches = launches
    return launcher


@pytest.mark.parametrize("rows", range(1, FUSED_ROWS + 1))
def test_a_launch(launcher, rows):
    first, second = products(), products()
    assert launcher.most_rows(first) == launcher.most_rows(second) == FUSED_ROWS
    x, residual = torch.empty(rows, 5120), torch.empty(rows, 5120)
    norms, bias = LayerNorms(torch.empty(5120), torch.empty(5120), 1e-6), torch.empty(7168)
    y = launcher(first, x, residual, norms, bias)
    launcher(second, x, residual, norms, None)
    (one, other), numbers = launcher.launches, []
    for launch, given, bias_size in ((one, first, 7168), (other, second, 0)):
        weights = [tensor for each in given for tensor in (each.codes, each.scales)]
        expected = [x, residual, norms.first_H, norms.second_H]
        assert all(a is b for a, b in zip(launch[:4], expected, strict=True)) and len(launch[4]) == bias_size
        assert all(a is b for a, b in zip(launch[6:18], weights, strict=True))
        numbers.append(launch[19:])
    assert one[5] is y and y.shape == (rows, 7168)
    assert one[18] is other[18] and (one[18] == -1).all() and one[18].dtype == torch.int32
    gate_up_strips, down_strips = 1 if rows < 5 else 2, [2, 2, 2, 3, 3, 4, 4, 6][rows - 1]
    assert numbers == [(1e-6, 132, 2, gate_up_strips, down_strips, 2, 4 // rows)] * 2
    outputs_and_parts = ((80, 4), (216, 4 * gate_up_strips), (80, 2 * down_strips), (112, 4))
    needed = 4 + sum(outputs * (2 * 8 * (32 + 1) + parts * rows * 64) for outputs, parts in outputs_and_parts)
    assert len(one[18]) >= needed and (len(one[18]) == needed) == (rows == FUSED_ROWS)


def test_another_shape_has_room_of_its_own(launcher):
    """Room that was once made stays: a graph may have captured it."""
    first, wider = products(), products({**SHAPE, "qkv": (8192, 5120)})
    launcher.most_rows(first)
    (before,) = launcher._scratch.values()
    launcher.most_rows(wider)
    launcher.most_rows(first)
    assert len(launcher._scratch) == 2 and any(scratch is before for scratch in launcher._scratch.values())


def test_what_does_not_fit(launcher):
    fitting = products()
    assert launcher.most_rows(fitting._replace(next_o=packed(5120, 4096))) == 0
    assert launcher.most_rows(fitting._replace(next_gate_up=packed(55296, 5120))) == 0
    assert launcher.most_rows(products({**SHAPE, "o": (896, 896)})) == 0
    assert launcher.most_rows(products({**SHAPE, "o": (8320, 5120)})) == 0
    assert not launcher._scratch


def test_a_shape_may_fit_for_fewer_rows(launcher):
    """27392 = 2 x 107 units: half of x, a strip's, leaves room for weights up to five rows."""
    shape = {**SHAPE, "gate_up": (2 * 27392, 5120), "down": (5120, 27392)}
    assert launcher.most_rows(products(shape)) == 5
