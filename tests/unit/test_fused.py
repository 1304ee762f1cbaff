"""Which layers of a model are fused, and what their modules do then; modules and the format are stand-ins."""

import pytest
import torch
from torch import nn

pytest.importorskip("sglang", reason="needs SGLang's models")

from er_sglang.drafting import fused
from er_sglang.drafting.linear import DraftLinearMethod, GatedLinearMethod

ROWS, HIDDEN = 4, 8


class Linear(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.bias = torch.ones(1) if bias else None
        self.input_size = self.input_size_per_partition = HIDDEN
        self.output_size = self.output_size_per_partition = HIDDEN
        self.skip_bias_add = False


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(HIDDEN)), 1e-6
        self._forward_method = lambda x, residual, more=None: ("alone", x, residual, more)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.qkv_proj, self.self_attn.o_proj = Linear(bias=True), Linear()
        self.mlp.gate_up_proj, self.mlp.down_proj = Linear(), Linear()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()


class FusingFormat:
    def __init__(self, rows: int = ROWS) -> None:
        self._rows = rows
        self.calls = []

    def fused_rows(self, products) -> int:
        return self._rows

    def apply_layer(self, *arguments) -> str:
        self.calls.append(arguments)
        return "qkv"

    def apply(self, packed, x, bias) -> str:
        return f"{packed} multiplied by"

    apply_gated = apply


class Model:
    """Three layers whose Linears have a method, and norms a twin."""

    def __init__(self, fmt: FusingFormat) -> None:
        self.fmt = fmt
        self.layers = [Layer() for _ in range(3)]
        self.root = nn.Module()
        self.root.layers = nn.ModuleList(self.layers)
        self.methods, self.twins = {}, {}
        for i, layer in enumerate(self.layers):
            for name, linear in layer.named_modules():
                if isinstance(linear, Linear):
                    cls = GatedLinearMethod if "gate_up" in name else DraftLinearMethod
                    method = cls.__new__(cls)
                    method.fmt, method.packed, method.passes_rows = fmt, f"{name.split('.')[-1]} {i}", 0
                    self.methods[linear] = method
                elif isinstance(linear, Norm):
                    self.twins[linear] = linear

    def fuse(self) -> dict[nn.Module, nn.Module]:
        return fused.fuse_layers(self.root, self.methods, self.twins)

    def passing(self) -> list[str]:
        assert {method.passes_rows for method in self.methods.values()} <= {0, ROWS}
        return [method.packed for method in self.methods.values() if method.passes_rows]


@pytest.fixture
def model(monkeypatch) -> Model:
    monkeypatch.setattr(fused, "_LAYERS", (Layer,))
    return Model(FusingFormat())


FIRST = ["o_proj 0", "gate_up_proj 0", "down_proj 0", "qkv_proj 1"]
SECOND = ["o_proj 1", "gate_up_proj 1", "down_proj 1", "qkv_proj 2"]


def test_all_but_the_ends_is_fused(model):
    first, second, third = model.layers
    assert set(model.fuse()) == {
        first.post_attention_layernorm,
        second.input_layernorm,
        second.post_attention_layernorm,
        third.input_layernorm,
    }
    assert sorted(model.passing()) == sorted(FIRST + SECOND)


@pytest.mark.parametrize("rows", [0, 1, ROWS, ROWS + 1])
def test_up_to_so_many_rows_pass(model, rows):
    twins, layer, following = model.fuse(), *model.layers[:2]
    x, residual, more = torch.ones(rows, HIDDEN), torch.ones(rows, HIDDEN), torch.ones(rows, HIDDEN)
    before, within = (
        twins[norm]._forward_method for norm in (layer.post_attention_layernorm, following.input_layernorm)
    )
    is_fused = 1 <= rows <= ROWS
    for linear in (layer.self_attn.o_proj, layer.mlp.gate_up_proj, following.self_attn.qkv_proj):
        applied = model.methods[linear].apply(linear, x)
        assert applied is x if is_fused else applied == f"{model.methods[linear].packed} multiplied by"
    linear = layer.self_attn.qkv_proj  # of the first layer
    assert model.methods[linear].apply(linear, x) == "qkv_proj 0 multiplied by"
    if not is_fused:
        assert before(x, residual, more) == ("alone", x, residual, more)
        assert within(x, residual, more) == ("alone", x, residual, more)
        return
    behind = [layer.mlp.gate_up_proj, following.self_attn.qkv_proj]  # which some releases give to the norms
    assert before(x, residual, quant_linear=behind[0]) == ("qkv", residual)
    assert within(x, residual, quant_linear=behind[1]) == (x, residual)
    ((products, fused_x, fused_residual, norms, bias),) = model.fmt.calls
    assert products == (*FIRST, "o_proj 1", "gate_up_proj 1")
    assert fused_x is x and fused_residual is residual and bias is following.self_attn.qkv_proj.bias
    assert norms == (layer.post_attention_layernorm.weight, following.input_layernorm.weight, 1e-6)
    _, sum_ = before(x, residual, more)
    assert torch.equal(sum_, residual + more) and model.fmt.calls[1][2] is sum_
    with pytest.raises(NotImplementedError, match="comes too late"):
        within(x, residual, more)


def spoil_tensor_parallel(model, layer):
    layer.mlp.down_proj.input_size_per_partition = HIDDEN // 2


def spoil_tensor_parallel_before(model, layer):
    layer.mlp.gate_up_proj.output_size_per_partition = HIDDEN // 2


def spoil_bias(model, layer):
    layer.self_attn.o_proj.bias = torch.ones(1)


def spoil_bias_behind(model, layer):
    layer.mlp.gate_up_proj.skip_bias_add = True


def spoil_conversion(model, layer):
    del model.methods[layer.mlp.down_proj]


def spoil_activation(model, layer):
    model.methods[layer.mlp.gate_up_proj].__class__ = DraftLinearMethod


def spoil_norm(model, layer):
    del model.twins[layer.post_attention_layernorm]


def spoil_eps(model, layer):
    layer.post_attention_layernorm.variance_epsilon = 1e-5


SPOILS = [value for name, value in globals().items() if name.startswith("spoil_")]


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_layer_that_does_more_is_not_fused(model, spoil):
    """The one before it still is, but that a fused layer knows the next one's products: what they read is brought into L2."""
    spoil(model, model.layers[1])
    twins = model.fuse()
    assert model.layers[1].post_attention_layernorm not in twins
    assert not set(model.passing()) & set(SECOND)
    assert sorted(model.passing()) == ([] if spoil is spoil_activation else sorted(FIRST))


def test_other_layers_are_not_fused(model, monkeypatch):
    monkeypatch.setattr(fused, "_LAYERS", (nn.Linear,))
    assert not model.fuse() and not model.passing()


def test_what_the_format_does_not_take_is_not_fused(monkeypatch):
    monkeypatch.setattr(fused, "_LAYERS", (Layer,))
    model = Model(FusingFormat(rows=0))
    assert not model.fuse() and not model.passing()
