"""SGLang plugin for tests: `/server_info` tells what an fp8 policy's weights are after loading, and whether the drafter's
int4 is a fresh quantization of them."""

from __future__ import annotations

import hashlib

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from er_sglang.quantize import marlin_layout, rtn

BLOCK = 128


def activate() -> None:
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", _show, HookType.AFTER)


def _show(result, scheduler, recv_req):
    worker = scheduler.draft_worker
    layers = {
        name: (layer, method.packed)
        for name, layer in worker.target_worker.model_runner.model.named_modules()
        if (method := worker._drafter._methods.get(layer)) is not None
    }
    result.internal_state["fresh"] = {name: _is_fresh(layer, packed) for name, (layer, packed) in layers.items()}
    result.internal_state["layouts"] = {name: _layout(layer) for name, (layer, _) in layers.items()}
    weights = (layer.weight.data.cpu().view(torch.uint8).numpy().tobytes() for layer, _ in layers.values())
    result.internal_state["policy"] = hashlib.sha256(b"".join(weights)).hexdigest()
    return result


def _is_fresh(layer, packed) -> bool:
    expected = rtn.quantize_int4(_dense(layer), group_size=128, symmetric=True)
    return torch.equal(packed.codes, marlin_layout.pack_codes(expected.codes_NK)) and torch.equal(
        packed.scales, marlin_layout.pack_scales(expected.scales_NG)
    )


def _dense(layer) -> torch.Tensor:
    weight = layer.weight.data
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    if hasattr(layer, "weight_scale_inv"):
        blocks = weight.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        return (blocks * layer.weight_scale_inv[:, None, :, None]).flatten(2).flatten(0, 1).bfloat16()
    return (weight.float() * layer.weight_scale.view(1, -1)).t().bfloat16()


def _layout(layer) -> str:
    names = ("weight", "weight_scale", "weight_scale_inv")
    tensors = {name: layer._parameters[name] for name in names if layer._parameters.get(name) is not None}
    return ", ".join(f"{name} {t.dtype} {list(t.shape)} strides {t.stride()}" for name, t in tensors.items())
