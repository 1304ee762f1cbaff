"""What we know of SGLang: what we take from it in every release, and the check of that and of what differs by release.

The version is checked wherever plugins load, in a few milliseconds. The seams are checked where SELF_QUANT is served:
where its ServerArgs are built, before anything is loaded, and in each scheduler. That takes 0.06 s of CPU a process: it
imports nothing, and reads the byte code that Python has kept since SGLang was first imported. Without that byte code it
compiles some forty modules, in 0.25 s.
"""

from __future__ import annotations

import ast
import dis
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import SourceFileLoader
from itertools import pairwise
from pathlib import Path
from types import CodeType

from er_sglang.host import releases

logger = logging.getLogger(__name__)

ALGORITHM = "SELF_QUANT"
# The version of an SGLang that is to be served on though it was never tested.
UNTESTED_ENV = "ER_SGLANG_UNTESTED_RELEASE"


def asks_for_us(server_args) -> bool:
    """Whether a server is to serve SELF_QUANT; its ServerArgs may be as the user wrote them."""
    return (server_args.speculative_algorithm or "").upper() == ALGORITHM


class UnsupportedHost(RuntimeError):
    """This SGLang is not the one we know; the message says what differs and what to do."""


@dataclass(frozen=True, slots=True)
class Seam:
    """A function of SGLang that we call, override, hook or rely upon, and its leading parameter names."""

    module: str
    name: str
    parameters: tuple[str, ...]


# Those of every release. Names that we import need none: they are found in our sources (`imported_names`).
SEAMS = """
# attach
plugins:load_plugins
plugins.hook_registry:HookRegistry._apply_target cls target hooks
speculative.spec_info:SpeculativeAlgorithm.register cls name supports_overlap validate_server_args spec_class
speculative.spec_registry:CustomSpecAlgo.__init__ self name factory supports_overlap validate_server_args
speculative.spec_registry:CustomSpecAlgo.handle_server_args self server_args
# the step
managers.scheduler:Scheduler.maybe_init_draft_worker self
speculative.base_spec_worker:BaseSpecWorker.on_verify_complete_cpu self num_correct_drafts_per_req batch_size
managers.overlap_utils:FutureMap.__init__ self device spec_algo req_to_token_pool needs_cpu_seq_lens
managers.overlap_utils:FutureMap._resolve_spec_extras self batch
speculative.eagle_utils:eagle_prepare_for_decode batch
managers.tp_worker:TpModelWorker.forward_batch_generation self batch forward_batch
model_executor.model_runner:ModelRunner.forward self forward_batch
model_executor.model_runner:ModelRunner._get_attention_backend self init_new_workspace
speculative.dflash_utils:resolve_dflash_verify_mask_policy attn_backend
layers.logits_processor:LogitsProcessor._compute_lm_head self hidden_states lm_head embedding_bias
layers.logits_processor:should_apply_lm_head_quant_method lm_head quant_method
# penalties
sampling.penaltylib.orchestrator:_BatchedPenalizer.prepare_if_required self
sampling.sampling_batch_info:SamplingBatchInfo.copy_for_forward self
sampling.sampling_batch_info:SamplingBatchInfo.apply_logits_bias self logits
model_executor.model_runner:ModelRunner._preprocess_logits self logits_output sampling_info
# the drafter's twins of small modules
layers.layernorm:RMSNorm.forward_cuda self x residual post_residual_addition
layers.activation:SiluAndMul.forward_cuda self x
layers.rotary_embedding.base:RotaryEmbedding.forward_cuda self positions query key
layers.radix_attention:RadixAttention.forward self q k v forward_batch save_kv_cache
model_executor.forward_context:get_token_to_kv_pool
models.qwen3:Qwen3Attention.forward_prepare_native self positions hidden_states
models.utils:apply_qk_norm q k q_norm k_norm head_dim
# graphs
model_executor.runner.base_cuda_graph_runner:get_batch_sizes_to_capture model_runner
model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner.__init__
    self model_runner attn_backend speculative_num_steps speculative_num_draft_tokens
model_executor.runner_backend.utils:resolve_decode_backend cuda_graph_runner
model_executor.runner_backend.full_cuda_graph_backend:FullCudaGraphBackend.capture_one self shape_key forward_fn
model_executor.graph_shared_output:GraphSharedOutput.create_for_model_runner cls model_runner
# hooks
managers.scheduler:Scheduler.get_internal_state self recv_req
managers.scheduler:Scheduler.set_internal_state self recv_req
managers.scheduler:Scheduler.continue_generation self recv_req
managers.scheduler:Scheduler.pause_generation self recv_req
managers.schedule_batch:Req.update_finish_state self new_accepted_len
managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor._resolve_spec_v2_tokens self result batch
managers.tokenizer_manager:TokenizerManager.init_request_dispatcher self
managers.tokenizer_manager:TokenizerManager._calculate_spec_decoding_metrics self meta_info recv_obj i
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_disk self recv_req
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_distributed self recv_req
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_tensor self recv_req
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.update_weights_from_ipc self recv_req
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.release_memory_occupation self recv_req
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.resume_memory_occupation self recv_req
managers.scheduler_components.logprob_result_processor:SchedulerLogprobResultProcessor.add_logprob_return_values
    self i req pt next_token_ids num_input_logprobs output
managers.schedule_batch:ScheduleBatch._new_tokens_required_next_decode_spec_v2 self requests page_size
managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor._normalize_decode_outputs
    self batch result logits_output next_token_ids
entrypoints.openai.serving_chat:OpenAIServingChat._generate_stream_content self content index request
function_call.function_call_parser:FunctionCallParser.parse_stream_chunk self chunk_text
entrypoints.engine:Engine._launch_detokenizer_subprocesses cls server_args port_args run_detokenizer_process_func
managers.multi_tokenizer_mixin:write_data_for_multi_tokenizer port_args server_args scheduler_info
managers.scheduler:Scheduler.on_idle self
managers.scheduler:Scheduler.is_fully_idle self
mem_cache.memory_pool:MHATokenToKVPool._init_kv_copy_and_warmup self
mem_cache.allocator.paged:alloc_extend_naive prefix_lens seq_lens last_loc free_pages out_indices page_size device
utils.common:get_num_new_pages seq_lens page_size prefix_lens decode
mem_cache.allocator.paged:PagedTokenToKVPoolAllocator.alloc_extend
    self prefix_lens prefix_lens_cpu seq_lens seq_lens_cpu last_loc extend_num_tokens num_new_pages
"""


def check_version() -> str:
    """The version of this SGLang; raises UnsupportedHost unless it is a supported release, or one that the user asks for
    and in which nothing differs of what we know.

    A local build of a release ("0.5.15.post1+cu129") is that release; what it changed, the seams tell.
    """
    try:
        version = releases.installed_version()
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedHost(f"SGLang is not installed: pip install sglang=={releases.DEFAULT_RELEASE}.") from error
    if version.partition("+")[0] in releases.RELEASES:
        return version
    if differences := _differences(version):
        raise UnsupportedHost(
            f"SGLang {version} is not supported, and differs where SELF_QUANT attaches: {'; '.join(differences)}. "
            + _remedy()
        )
    if os.environ.get(UNTESTED_ENV) != version:
        raise UnsupportedHost(
            f"SGLang {version} is not supported: nothing differs where SELF_QUANT attaches, but it was never tested. "
            f"To serve all the same, set {UNTESTED_ENV}={version}. {_remedy()}"
        )
    logger.warning(
        "%s serves on SGLang %s, on which it was never tested, as %s asks.", ALGORITHM, version, UNTESTED_ENV
    )
    return version


def _remedy() -> str:
    default = releases.DEFAULT_RELEASE
    return (
        f"Install one of {', '.join(releases.RELEASES)} (pip install sglang=={default}). If this is a checkout of such a "
        f"release under another version, state it: SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SGLANG={default} "
        "pip install --no-deps -e python"
    )


@cache
def check_host() -> None:
    """Raise UnsupportedHost unless this SGLang is a supported release and has all that we take from it, unchanged."""
    version = check_version()
    if differences := _differences(version):
        raise UnsupportedHost(
            f"SGLang {version} was changed where SELF_QUANT attaches: {'; '.join(differences)}. "
            "Use the released sources (slime's own patches are fine) or a matching er_sglang."
        )


def warn_if_never_run_on_gpu() -> None:
    if (version := releases.installed_version()).partition("+")[0] not in releases.RUN_ON_GPU:
        logger.warning("%s was never run on a GPU with SGLang %s, only on CPU.", ALGORITHM, version)


def _differences(version: str) -> list[str]:
    """How this SGLang differs from the release, of which it says to be."""
    files = list(_sources(version))
    seams = [*imported_names(files), *written_seams(files)]
    return [difference for seam in dict.fromkeys(seams) if (difference := _compare(seam))]


def _sources(version: str) -> Iterator[Path]:
    """Our sources, but of releases/ those for this version of SGLang alone."""
    package, drifts = Path(__file__).parents[1], Path(releases.__file__).parent
    yield from (file for file in sorted(package.rglob("*.py")) if file.parent != drifts)
    needed = list(releases.chosen(version).values())
    for name in needed:  # grows on the way
        text = (drifts / f"{name}.py").read_text()
        needed += [
            other for other in re.findall(rf"from {releases.__name__}\.(\w+) import", text) if other not in needed
        ]
        yield drifts / f"{name}.py"


def imported_names(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(module, name) of all that these sources of ours import from SGLang."""
    for file in files:
        if "from sglang" in (text := file.read_text()):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sglang":
                    yield from ((node.module, alias.name) for alias in node.names)


def written_seams(files: Iterable[Path]) -> Iterator[Seam]:
    """What these sources of ours write down as ``SEAMS``: module (of ``sglang.srt``, or by its whole name), function and
    parameters, a line each, which indented lines continue."""
    for file in files:
        if "\nSEAMS = " in (text := file.read_text()):
            for node in ast.parse(text).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SEAMS":
                    lines = ast.literal_eval(node.value).replace("\n    ", " ").splitlines()
                    yield from (_seam(line) for line in lines if line and not line.startswith("#"))


def _seam(line: str) -> Seam:
    path, *parameters = line.split()
    module, name = path.split(":")
    return Seam(module if module.startswith("sglang.") else f"sglang.srt.{module}", name, tuple(parameters))


def _compare(seam: Seam | tuple[str, str]) -> str | None:
    """What is wrong with a seam or an imported name, None if nothing."""
    if isinstance(seam, tuple):
        module, name = seam
        return None if _defines(module, name) else f"{module}.{name} is missing"
    code = _code(seam.module)
    if code is None:
        return f"module {seam.module} is missing"
    for part in seam.name.split("."):
        code = next((c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part), None)
        if code is None:
            return f"{seam.module}.{seam.name} is missing"
    found = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if found[: len(seam.parameters)] != seam.parameters:
        return f"{seam.module}.{seam.name} takes ({', '.join(found)}), expected ({', '.join(seam.parameters)}, ...)"
    return None


def _defines(module: str, name: str) -> bool:
    """Whether ``from module import name`` finds something."""
    return _code(f"{module}.{name}") is not None or name in _names(module)


@cache
def _names(module: str) -> set[str]:
    """Names that a module binds, its star imports included."""
    names = set()
    if (code := _code(module)) is not None:
        for previous, instruction in pairwise(dis.get_instructions(code)):
            if instruction.opname == "STORE_NAME":
                names.add(instruction.argval)
            elif instruction.opname == "IMPORT_NAME" and previous.argval == ("*",):
                names |= _names(instruction.argval)
    return names


@cache
def _code(module: str) -> CodeType | None:
    """The compiled body of a module of SGLang, None if there is none."""
    root = importlib.util.find_spec("sglang")
    base = Path(root.submodule_search_locations[0], *module.split(".")[1:])
    file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.is_file()), None)
    return SourceFileLoader(module, str(file)).get_code(module) if file else None
