"""What SELF_QUANT cannot honour, found at start-up, each with a sentence that says what to do.

Reads plain attributes of ``ServerArgs`` and of the model's Hugging Face config; knows neither torch nor SGLang.
"""

from __future__ import annotations

from typing import Any

from er_sglang.config import SIMULATE_ACCEPTANCE_ENV
from er_sglang.errors import ConfigError
from er_sglang.host.seams import ALGORITHM, UnsupportedHost

# The drafter's shadow copy and the plain-decode sequence of the chain were checked with these model classes, each of
# the module of SGLang given.
SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "sglang.srt.models.llama",
    "MistralForCausalLM": "sglang.srt.models.mistral",
    "Qwen2ForCausalLM": "sglang.srt.models.qwen2",
    "Qwen3ForCausalLM": "sglang.srt.models.qwen3",
}

# (ServerArgs field, values that are fine, what to do about any other)
_FIELDS = (
    ("speculative_draft_model_path", (None,), "drop --speculative-draft-model-path: the policy drafts for itself"),
    ("speculative_draft_load_format", (None,), "drop --speculative-draft-load-format: there is no draft checkpoint"),
    ("speculative_eagle_topk", (None, 1), "drop --speculative-eagle-topk: drafts are chains"),
    ("speculative_token_map", (None,), "drop --speculative-token-map: the drafter has the policy's vocabulary"),
    ("speculative_adaptive", (False,), "drop --speculative-adaptive: gamma is decided by our own policy"),
    ("speculative_accept_threshold_single", (1.0,), "leave --speculative-accept-threshold-single at 1: acceptance is exact"),
    ("speculative_accept_threshold_acc", (1.0,), "leave --speculative-accept-threshold-acc at 1: acceptance is exact"),
    ("speculative_use_rejection_sampling", (False,), "drop --speculative-use-rejection-sampling: acceptance is exact without it"),
    ("speculative_attention_mode", ("prefill",), "leave --speculative-attention-mode at prefill"),
    ("speculative_draft_attention_backend", (None,), "drop --speculative-draft-attention-backend: drafts read the policy's KV cache"),
    ("speculative_draft_window_size", (None,), 'drop --speculative-draft-window-size: set "drafter": {"attention_window": ...} in the config'),
    ("quantization", (None, "fp8"), "serve the policy in bf16, fp16 or fp8 (a quantized checkpoint sets this by itself)"),
    ("kv_cache_dtype", ("auto", "bfloat16", "bf16", "fp8_e4m3", "fp8_e5m2"), "leave --kv-cache-dtype at auto, or take fp8_e4m3 or fp8_e5m2"),
    ("torchao_config", ("",), "drop --torchao-config: the drafter is made from unquantized weights"),
    ("cpu_offload_gb", (0,), "drop --cpu-offload-gb: the drafter is made from weights on the GPU"),
    ("offload_group_size", (-1,), "drop --offload-group-size: the drafter is made from weights on the GPU"),
    ("model_impl", ("auto", "sglang"), "leave --model-impl at auto: only SGLang's own model classes are supported"),
    ("is_embedding", (False,), "drop --is-embedding: an embedding model generates no tokens to draft"),
    ("enable_lora", (None, False), "merge the LoRA adapter into the weights: the drafter is built from merged weights"),
    ("lora_paths", (None, []), "merge the LoRA adapter into the weights: the drafter is built from merged weights"),
    ("pp_size", (1,), "use --tp instead of --pp-size"),
    ("dcp_size", (None, 1), "leave --dcp-size at 1"),
    ("enable_dp_attention", (False,), "drop --enable-dp-attention"),
    ("disaggregation_mode", ("null",), "serve prefill and decode together: PD disaggregation is not supported"),
    ("enable_mixed_chunk", (False,), "drop --enable-mixed-chunk"),
    ("enable_two_batch_overlap", (False,), "drop --enable-two-batch-overlap"),
    ("enable_pdmux", (False,), "drop --enable-pdmux"),
    ("enable_hisparse", (False,), "drop --enable-hisparse"),
    ("enable_torch_compile", (False,), "drop --enable-torch-compile"),
    ("dllm_algorithm", (None,), "drop --dllm-algorithm"),
    ("enable_deterministic_inference", (False,), "drop --enable-deterministic-inference: per-request seeds are not reproduced while drafting"),
    ("rl_on_policy_target", (None,), "drop --rl-on-policy-target: it needs deterministic inference"),
)  # fmt: skip

_FP8_BLOCKS = (None, [128, 128])  # weight_block_size of a checkpoint


def check_server_args(args: Any, more: tuple = (), gone: tuple = ()) -> None:
    """Raise ConfigError naming every setting of ``args`` that SELF_QUANT cannot honour.

    more: fields besides ours that this release has. gone: those of ours that it has not.

    Raises UnsupportedHost for a field that is gone: what it refused may go by another name.
    """
    fields = [row for row in (*_FIELDS, *more) if row[0] not in gone]
    if unknown := [field for field, _, _ in fields if not hasattr(args, field)]:
        raise UnsupportedHost(
            f"ServerArgs of this SGLang has no {', '.join(unknown)}, so what {ALGORITHM} cannot serve with goes unseen. "
            "Use the released sources or a matching er_sglang."
        )
    problems = [
        f"{field} is {value!r}: {remedy}"
        for field, fine, remedy in fields
        if (value := getattr(args, field)) not in fine
    ]
    # SGLang copies --quantization here, for a draft checkpoint.
    if (quantization := args.speculative_draft_model_quantization) not in (None, args.quantization):
        problems.append(
            f"speculative_draft_model_quantization is {quantization!r}: drop --speculative-draft-model-quantization: "
            'set "drafter": {"weights": ...} in the config'
        )
    steps, width = args.speculative_num_steps, args.speculative_num_draft_tokens
    if width is not None and width != (steps or 0) + 1:
        problems.append(
            f"speculative_num_draft_tokens is {width}: drop it, or set it to --speculative-num-steps + 1 "
            "(a chain of gamma drafts is verified with its first input)"
        )
    if problems:
        raise ConfigError(f"{ALGORITHM} cannot serve with these settings. " + ". ".join(problems) + ".")


def check_model(hf_config: Any) -> None:
    """Raise ConfigError for a model by name, or a quantized checkpoint, that SELF_QUANT does not support."""
    architectures = list(hf_config.architectures or [])
    if not set(architectures) & set(SUPPORTED_ARCHITECTURES):
        raise ConfigError(
            f"{ALGORITHM} does not support {', '.join(architectures) or 'this model'}; "
            f"it supports {', '.join(SUPPORTED_ARCHITECTURES)}. Serve this model without --speculative-algorithm."
        )
    if (config := getattr(hf_config, "quantization_config", None)) is not None:
        config = config if isinstance(config, dict) else config.to_dict()
        method, block = config.get("quant_method"), config.get("weight_block_size")
        if method != "fp8" or block not in _FP8_BLOCKS:
            raise ConfigError(
                f"The checkpoint is already quantized ({method}{f' in blocks of {block}' if block else ''}). {ALGORITHM} "
                "drafts with a quantized copy of a policy in bf16, fp16, or fp8 with a scale per tensor or per block of "
                "128 x 128: serve such a checkpoint."
            )


def check_drafter(weights: str, quantization: str | None) -> None:
    """Raise ConfigError for a drafter that would be as large as its policy."""
    if weights == quantization == "fp8":
        raise ConfigError(
            'The policy is fp8 already, so an fp8 drafter would be no faster: set "drafter": {"weights": "int4"}.'
        )


def check_model_class(model: type) -> None:
    """Raise ConfigError unless the policy was loaded as the class that its name stands for in SGLang."""
    if SUPPORTED_ARCHITECTURES.get(model.__name__) != model.__module__:
        raise ConfigError(
            f"The policy was loaded as {model.__module__}.{model.__name__}, which {ALGORITHM} does not support; it "
            f"supports SGLang's own {', '.join(SUPPORTED_ARCHITECTURES)}. Unset SGLANG_EXTERNAL_MODEL_PACKAGE, or "
            "serve without --speculative-algorithm."
        )


def check_simulated_acceptance(simulated: object, load_format: str) -> None:
    """Raise ConfigError for a simulated acceptance where responses could be taken for a policy's."""
    if simulated is not None and load_format != "dummy":
        raise ConfigError(
            f"{SIMULATE_ACCEPTANCE_ENV} is set, and responses would not be the policy's: unset it. For benchmarks of "
            f"random weights, add --load-format dummy (it is {str(load_format)!r})."
        )
