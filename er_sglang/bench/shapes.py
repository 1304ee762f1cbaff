"""Model shapes by name, written as a config.json: enough for `--load-format dummy`, no download needed."""

import json
from pathlib import Path

# Qwen2.5 dimensions; `tiny` is for CPU.
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064),
    "14b": dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, vocab_size=152064),
}  # fmt: skip

# What a user of STANDALONE would draft with today: 4 bits, group 128; SGLang runs it through its Marlin kernels.
W4_DRAFT = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def model_config(shape: str, *, quantized: bool = False) -> dict:
    """The Hugging Face config of `shape`; `quantized` adds the 4-bit weights of W4_DRAFT."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
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
