"""Model shapes by name, written as a config.json: enough for `--load-format dummy`, no download needed."""

import json
from pathlib import Path

_QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "head_dim": 128}


def _shape(family: dict, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **family,
        **more,
    }


# Of Qwen2.5 and, where the name says so, Qwen3; `tiny` is for CPU.
SHAPES = {
    "tiny": _shape(_QWEN2, 256, 512, 2, 4, 2, vocab_size=1024),
    "0.5b": _shape(_QWEN2, 896, 4864, 24, 14, 2, vocab_size=151936, tie_word_embeddings=True),
    "7b": _shape(_QWEN2, 3584, 18944, 28, 28, 4),
    "14b": _shape(_QWEN2, 5120, 13824, 48, 40, 8),
    "32b": _shape(_QWEN2, 5120, 27648, 64, 40, 8),
    "qwen3-4b": _shape(_QWEN3, 2560, 9728, 36, 32, 8, tie_word_embeddings=True),
    "qwen3-8b": _shape(_QWEN3, 4096, 12288, 36, 32, 8),
}

# What a user of STANDALONE would draft with today: 4 bits, group 128; SGLang runs it through its Marlin kernels.
W4_DRAFT = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def heads(shape: dict) -> tuple[int, int, int]:
    """Query heads, KV heads and head_dim of a shape."""
    heads_q = shape["num_attention_heads"]
    return heads_q, shape["num_key_value_heads"], shape.get("head_dim", shape["hidden_size"] // heads_q)


def model_config(shape: str, *, quantized: bool = False) -> dict:
    """The Hugging Face config of `shape`; `quantized` adds the 4-bit weights of W4_DRAFT."""
    config = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    if quantized:
        config["quantization_config"] = W4_DRAFT
    return config


def write_model(folder: Path, shape: str, *, quantized: bool = False) -> Path:
    """Write the config of `shape` below `folder` and return the model path."""
    path = folder / (f"{shape}-w4" if quantized else shape)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model_config(shape, quantized=quantized), indent=2))
    return path
