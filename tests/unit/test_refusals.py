"""Settings that SELF_QUANT refuses, against the ServerArgs of the installed SGLang (its sources; nothing is
imported)."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from er_sglang.errors import ConfigError
from er_sglang.host import refusals
from er_sglang.host.seams import UnsupportedHost


@pytest.fixture
def args() -> SimpleNamespace:
    """ServerArgs as far as they are refused, every field at its default."""
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        pytest.skip("reads SGLang's sources")
    tree = ast.parse(Path(spec.submodule_search_locations[0], "srt", "server_args.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs")
    nodes = {node.target.id: node.value for node in body if isinstance(node, ast.AnnAssign)}
    names = [field for field, _, _ in refusals._FIELDS] + [
        *("speculative_num_steps", "speculative_num_draft_tokens", "speculative_draft_model_quantization")
    ]
    return SimpleNamespace(**{name: ast.literal_eval(nodes[name]) for name in names})


def test_defaults_are_accepted(args):
    refusals.check_server_args(args)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("torchao_config", "int8wo"),
        ("cpu_offload_gb", 1),
        ("offload_group_size", 4),
        ("model_impl", "transformers"),
        ("is_embedding", True),
        ("speculative_use_rejection_sampling", True),
        ("speculative_attention_mode", "decode"),
    ],
)
def test_what_changes_the_policy_or_its_acceptance_is_refused(args, field, value):
    setattr(args, field, value)
    with pytest.raises(ConfigError, match=f"{field} is {value!r}"):
        refusals.check_server_args(args)


def test_quantization_need_not_have_been_a_flag(args):
    """A quantized checkpoint sets the field by itself."""
    args.quantization = "compressed-tensors"
    with pytest.raises(ConfigError, match="'compressed-tensors': serve the policy in bf16, fp16 or fp8") as refusal:
        refusals.check_server_args(args)
    assert "--quantization" not in str(refusal.value)


@pytest.mark.parametrize("method", ["awq", "gptq", "w8a8_int8", "w8a8_fp8", "modelopt", "mxfp8", "mxfp4", "w4afp8"])
def test_only_fp8_policies_are_accepted(args, method):
    args.quantization = args.speculative_draft_model_quantization = "fp8"  # SGLang copies the one to the other
    refusals.check_server_args(args)
    args.quantization = args.speculative_draft_model_quantization = method
    with pytest.raises(ConfigError, match=f"quantization is '{method}': serve the policy in bf16"):
        refusals.check_server_args(args)


def test_a_draft_checkpoints_quantization_is_refused(args):
    args.speculative_draft_model_quantization = "fp8"
    with pytest.raises(ConfigError, match="speculative_draft_model_quantization is 'fp8': drop"):
        refusals.check_server_args(args)


def test_only_fp8_kv_caches_are_accepted(args):
    for dtype in ("fp8_e4m3", "fp8_e5m2"):
        args.kv_cache_dtype = dtype
        refusals.check_server_args(args)
    args.kv_cache_dtype = "fp4_e2m1"
    with pytest.raises(ConfigError, match="kv_cache_dtype is 'fp4_e2m1': leave --kv-cache-dtype at auto"):
        refusals.check_server_args(args)


def checkpoint(**quantization) -> SimpleNamespace:
    return SimpleNamespace(architectures=["Qwen3ForCausalLM"], quantization_config=quantization)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("block", [{}, {"weight_block_size": None}, {"weight_block_size": [128, 128]}])
def test_fp8_checkpoints_are_accepted(scheme, block):
    refusals.check_model(checkpoint(quant_method="fp8", activation_scheme=scheme, **block))


@pytest.mark.parametrize(
    "quantization, named",
    [
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "modelopt"}, "modelopt"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, r"fp8 in blocks of \[64, 64\]"),
        ({"quant_algo": "FP8"}, "None"),
    ],
)
def test_other_quantized_checkpoints_are_refused(quantization, named):
    with pytest.raises(ConfigError, match=rf"already quantized \({named}\)\. .* or fp8 with a scale per tensor or per"):
        refusals.check_model(checkpoint(**quantization))


def test_an_fp8_drafter_of_an_fp8_policy_is_refused():
    refusals.check_drafter("int4", "fp8")
    refusals.check_drafter("fp8", None)
    with pytest.raises(ConfigError, match='fp8 already.*"weights": "int4"'):
        refusals.check_drafter("fp8", "fp8")


@pytest.mark.parametrize("field", [field for field, _, _ in refusals._FIELDS])
def test_a_field_that_is_gone_is_an_unsupported_host(args, field):
    delattr(args, field)
    with pytest.raises(UnsupportedHost, match=f"has no {field},"):
        refusals.check_server_args(args)


def test_only_sglangs_own_classes_are_accepted():
    for name, module in refusals.SUPPORTED_ARCHITECTURES.items():
        refusals.check_model_class(type(name, (), {"__module__": module}))
    with pytest.raises(ConfigError, match="loaded as external.qwen3.Qwen3ForCausalLM"):
        refusals.check_model_class(type("Qwen3ForCausalLM", (), {"__module__": "external.qwen3"}))
    with pytest.raises(ConfigError, match="loaded as sglang.srt.models.transformers.TransformersForCausalLM"):
        refusals.check_model_class(
            type("TransformersForCausalLM", (), {"__module__": "sglang.srt.models.transformers"})
        )
