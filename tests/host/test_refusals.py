"""What SELF_QUANT cannot honour is refused when ServerArgs are built, with a sentence that says what to do.

All cases run in one fresh interpreter that has loaded SGLang's plugins, as a server does.
"""

import json
import os
import subprocess
import sys

import pytest

from er_sglang.config import CONFIG_ENV, SIMULATE_ACCEPTANCE_ENV
from er_sglang.host import refusals
from er_sglang.tools.serving import CPU_ENV
from tests.host.servers import ARGS, ENV, START_TIMEOUT_S, HostServer

SCRIPT = """
import json, os, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
messages = {}
for name, (values, env) in json.load(sys.stdin).items():
    os.environ.update({"ER_SGLANG_CONFIG": "{}", **env})
    try:
        args = ServerArgs(**values)
        messages[name] = f"accepted with gamma {args.speculative_num_steps}"
    except Exception as error:
        messages[name] = f"{type(error).__name__}: {error}"
    for variable in env:
        del os.environ[variable]
print("RESULT" + json.dumps(messages))
"""

POLICY = "the policy's own path"
# ServerArgs that are refused, and what the message tells the user to do.
SETTINGS = {
    "speculative_draft_model_path": (POLICY, "drop --speculative-draft-model-path"),
    "speculative_draft_load_format": ("dummy", "drop --speculative-draft-load-format"),
    "speculative_eagle_topk": (4, "drop --speculative-eagle-topk"),
    "speculative_token_map": ("map.pt", "drop --speculative-token-map"),
    "speculative_adaptive": (True, "drop --speculative-adaptive"),
    "speculative_accept_threshold_single": (0.9, "leave --speculative-accept-threshold-single at 1"),
    "speculative_accept_threshold_acc": (0.9, "leave --speculative-accept-threshold-acc at 1"),
    "speculative_draft_attention_backend": ("triton", "drop --speculative-draft-attention-backend"),
    "speculative_draft_window_size": (512, 'set "drafter": {"attention_window"'),
    "speculative_draft_model_quantization": ("fp8", 'set "drafter": {"weights"'),
    "speculative_use_rejection_sampling": (True, "drop --speculative-use-rejection-sampling"),
    "speculative_attention_mode": ("decode", "leave --speculative-attention-mode at prefill"),
    "quantization": ("w8a8_int8", "serve the policy in bf16, fp16 or fp8"),
    "torchao_config": ("int8wo", "drop --torchao-config"),
    "cpu_offload_gb": (1, "drop --cpu-offload-gb"),
    "offload_group_size": (4, "drop --offload-group-size"),
    "model_impl": ("transformers", "leave --model-impl at auto"),
    "is_embedding": (True, "drop --is-embedding"),
    "enable_lora": (True, "merge the LoRA adapter"),
    "lora_paths": (["some/adapter"], "merge the LoRA adapter"),
    "pp_size": (2, "use --tp instead of --pp-size"),
    "enable_dp_attention": (True, "drop --enable-dp-attention"),
    "disaggregation_mode": ("decode", "serve prefill and decode together"),
    "enable_mixed_chunk": (True, "drop --enable-mixed-chunk"),
    "enable_two_batch_overlap": (True, "drop --enable-two-batch-overlap"),
    "enable_pdmux": (True, "drop --enable-pdmux"),
    "enable_hisparse": (True, "drop --enable-hisparse"),
    "enable_torch_compile": (True, "drop --enable-torch-compile"),
    "dllm_algorithm": ("LowConfidence", "drop --dllm-algorithm"),
    "enable_deterministic_inference": (True, "drop --enable-deterministic-inference"),
    "rl_on_policy_target": ("fsdp", "drop --rl-on-policy-target"),
    "speculative_num_draft_tokens": (9, "drop it, or set it to --speculative-num-steps + 1"),
}
# SGLang itself refuses them where SELF_QUANT is supported, or on a CPU.
REFUSED_BEFORE = {"dcp_size", "kv_cache_dtype"}
# Environments that are refused whatever the arguments; tests/unit/test_config.py has all that a config can get wrong.
ENVIRONMENTS = {
    "key": ({CONFIG_ENV: '{"modus": "always"}'}, "unknown setting modus; known: calibration_s, drafter,"),
    "file": ({CONFIG_ENV: "/no/such/file.json"}, "cannot read the SELF_QUANT config /no/such/file.json"),
    "simulated": ({SIMULATE_ACCEPTANCE_ENV: "0.9"}, "add --load-format dummy (it is 'auto')"),
    "simulated badly": ({SIMULATE_ACCEPTANCE_ENV: "9"}, "must be a number from 0 to 1"),
}
# Model classes that are refused, and what in config.json makes the policy one of them.
MODELS = {
    "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe", "num_experts": 8},
    "DeepseekV2ForCausalLM": {"model_type": "deepseek_v2"},
    "Gemma2ForCausalLM": {"model_type": "gemma2"},
}
FP8_DRAFTER = {CONFIG_ENV: '{"drafter": {"weights": "fp8"}}'}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}


@pytest.fixture(scope="module")
def messages(qwen3, tmp_path_factory):
    """What building ServerArgs answers, by case."""
    base = {
        "model_path": str(qwen3),
        "device": "cpu",
        "attention_backend": "torch_native",
        "skip_tokenizer_init": True,
        "speculative_algorithm": "SELF_QUANT",
        "speculative_num_steps": 3,
    }
    cases = {
        "accepted": (base, {}),
        "too long": ({**base, "speculative_num_steps": 16}, {}),
        "simulated on random weights": ({**base, "load_format": "dummy"}, {SIMULATE_ACCEPTANCE_ENV: "0.9"}),
    }
    fp8 = {**base, "quantization": "fp8", "kv_cache_dtype": "fp8_e5m2"}
    cases |= {"fp8": (fp8, {}), "fp8 drafter of fp8": (fp8, FP8_DRAFTER)}
    for name, (value, _) in SETTINGS.items():
        cases[name] = ({**base, name: str(qwen3) if value == POLICY else value}, {})
    for name in ("enable_deterministic_inference", "rl_on_policy_target"):
        cases[name][0]["attention_backend"] = "triton"  # SGLang's own condition
    cases |= {name: (base, env) for name, (env, _) in ENVIRONMENTS.items()}
    policy = json.loads((qwen3 / "config.json").read_text())
    variants = {name: {**policy, **changes, "architectures": [name]} for name, changes in MODELS.items()}
    variants |= {name: {**policy, "quantization_config": values} for name, values in (("AWQ", AWQ), ("FP8", FP8))}
    for name, values in variants.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(values))
        cases[name] = ({**base, "model_path": str(folder)}, {})
    cases["fp8 drafter of FP8"] = (cases["FP8"][0], FP8_DRAFTER)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(cases),
        env={**os.environ, **CPU_ENV},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def test_good_settings_are_accepted(messages):
    assert messages["accepted"] == messages["simulated on random weights"] == "accepted with gamma 3"


def test_every_refused_setting_has_a_case():
    refused = {field for field, _, _ in refusals._FIELDS} | {
        *("speculative_num_draft_tokens", "speculative_draft_model_quantization")
    }
    assert refused == set(SETTINGS) | REFUSED_BEFORE


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(messages, name):
    assert messages[name].startswith("ConfigError: SELF_QUANT cannot serve with these settings.")
    assert f"{name} is " in messages[name]
    assert SETTINGS[name][1] in messages[name]


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(messages, name):
    assert messages[name].startswith("ConfigError: ")
    assert ENVIRONMENTS[name][1] in messages[name]


def test_too_long_drafts(messages):
    assert messages["too long"] == "ConfigError: --speculative-num-steps is 16; choose 1 to 15."


@pytest.mark.parametrize("name", MODELS)
def test_model(messages, name):
    assert messages[name].startswith(f"ConfigError: SELF_QUANT does not support {name}; it supports LlamaForCausalLM,")
    assert "Serve this model without --speculative-algorithm" in messages[name]


def test_quantized_checkpoint(messages):
    assert messages["AWQ"].startswith("ConfigError: The checkpoint is already quantized (awq).")
    assert "serve such a checkpoint" in messages["AWQ"]


def test_fp8_policies(messages):
    """By flag or by checkpoint; drafted for in fewer bits."""
    assert messages["fp8"] == messages["FP8"] == "accepted with gamma 3"
    for name in ("fp8 drafter of fp8", "fp8 drafter of FP8"):
        assert messages[name].startswith("ConfigError: The policy is fp8 already")


def test_a_class_of_the_right_name_that_is_not_sglangs(qwen3, tmp_path):
    """Known only once the policy is loaded: the name in config.json says nothing of it."""
    (tmp_path / "other_models").mkdir()
    (tmp_path / "other_models/__init__.py").touch()
    (tmp_path / "other_models/qwen3.py").write_text(
        "from sglang.srt.models import qwen3\nclass Qwen3ForCausalLM(qwen3.Qwen3ForCausalLM): pass\n"
        "EntryClass = Qwen3ForCausalLM\n"
    )
    env = {**ENV, "SGLANG_EXTERNAL_MODEL_PACKAGE": "other_models", "PYTHONPATH": str(tmp_path)}  # read at import
    args, log = {**ARGS, "speculative-algorithm": "SELF_QUANT"}, tmp_path / "server.log"
    server = HostServer(qwen3, args, env=env, log_path=log)
    with pytest.raises(RuntimeError, match="the server stopped with exit code"), server:
        pass
    assert "ConfigError: The policy was loaded as other_models.qwen3.Qwen3ForCausalLM" in log.read_text()
