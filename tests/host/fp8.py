"""fp8 checkpoints made on the spot, and what they mean in float32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

BLOCK = 128
FP8_MAX = 448.0
LINEAR = "_proj.weight"  # lm_head and the embedding stay as they are
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def block_quantized(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 codes, and the scale of each block of 128 x 128, as Qwen3's fp8 checkpoints have them."""
    blocks = weight_NK.float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scales = blocks.abs().amax((1, 3)) / FP8_MAX
    codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2).flatten(0, 1), scales


def make_fp8_policy(policy: Path, path: Path) -> Path:
    """``policy``, its Linear layers in fp8 by blocks: tensors `weight` and `weight_scale_inv`."""
    tensors = {}
    for name, weight in load_file(policy / "model.safetensors").items():
        if name.endswith(LINEAR):
            tensors[name], tensors[f"{name}_scale_inv"] = block_quantized(weight)
        else:
            tensors[name] = weight
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((policy / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return path


def make_dense_policy(policy: Path, fp8_policy: Path, path: Path) -> Path:
    """What ``fp8_policy``, made of ``policy``, means: codes times scales, in float32."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    tensors = load_file(fp8_policy / "model.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(LINEAR):
                codes, scales = tensors[name], tensors[f"{name}_scale_inv"]
                for i in range(len(scales)):
                    for j in range(scales.shape[1]):
                        block = slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1))
                        weight[block] = codes[block].float() * scales[i, j]
    model.save_pretrained(path)
    return path


def make_dense_online_policy(policy: Path, path: Path) -> Path:
    """What --quantization fp8 makes of ``policy`` without CUTLASS, in float32: a scale per fused layer."""
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            fused = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
            for linears in (*fused, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]):
                scale = FP8_MAX / max(linear.weight.abs().max() for linear in linears)
                for linear in linears:
                    codes = (linear.weight * scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
                    linear.weight.copy_(codes.float() * scale.reciprocal())
    model.save_pretrained(path)
    return path
