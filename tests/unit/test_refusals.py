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
from er_sglang.host.seams import SUPPORTED_ARCHITECTURES, UnsupportedHost


@pytest.fixture
def args() -> SimpleNamespace:
    """ServerArgs as far as they are refused, every field at its default."""
    spec = importlib.util.find_spec("sglang")
    if spec is None:
        pytest.skip("reads SGLang's sources")
    tree = ast.parse(Path(spec.submodule_search_locations[0], "srt", "server_args.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerArgs")
    nodes = {node.target.id: node.value for node in body if isinstance(node, ast.AnnAssign)}
    names = [field for field, _, _ in refusals._FIELDS] + ["speculative_num_steps", "speculative_num_draft_tokens"]
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
    with pytest.raises(ConfigError, match="'compressed-tensors': serve the policy in bf16") as refusal:
        refusals.check_server_args(args)
    assert "--quantization" not in str(refusal.value)


@pytest.mark.parametrize("field", [field for field, _, _ in refusals._FIELDS])
def test_a_field_that_is_gone_is_an_unsupported_host(args, field):
    delattr(args, field)
    with pytest.raises(UnsupportedHost, match=f"has no {field},"):
        refusals.check_server_args(args)


def test_only_sglangs_own_classes_are_accepted():
    for name, module in SUPPORTED_ARCHITECTURES.items():
        refusals.check_model_class(type(name, (), {"__module__": module}))
    with pytest.raises(ConfigError, match="loaded as external.qwen3.Qwen3ForCausalLM"):
        refusals.check_model_class(type("Qwen3ForCausalLM", (), {"__module__": "external.qwen3"}))
    with pytest.raises(ConfigError, match="loaded as sglang.srt.models.transformers.TransformersForCausalLM"):
        refusals.check_model_class(
            type("TransformersForCausalLM", (), {"__module__": "sglang.srt.models.transformers"})
        )
