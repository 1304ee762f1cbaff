"""Test-only SGLang plugin: what a CPU or stock SGLang lacks of a trainer's ways.

- `/weights_checker {"action": "write PATH"}` writes a checkpoint straight into the policy's parameters, and
  `{"action": "post-process"}` does what slime's patch does for its `/post_process_weights`.
- `/update_weights_from_ipc` finds a device per rank, "cpu-0" and so on, and in `checkpoint_engine/` an engine.
- Memory released is lost: the policy's and the drafter's weights become NaN and noise, KV becomes NaN.
- The scheduler rests when it has answered a request named "linger...", so that the next message is there when it looks.
- `/server_info` shows a digest of the drafter's weights, layer by layer, and where they lie.
"""

import hashlib
import time

LINGER_S = 0.5


def activate() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    managers = "sglang.srt.managers."
    updater = f"{managers}scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
    HookRegistry.register(f"{updater}.check_weights", _write_or_post_process, HookType.AROUND)
    HookRegistry.register(f"{updater}.update_weights_from_ipc", _cpu_engine, HookType.BEFORE)
    HookRegistry.register(f"{updater}.release_memory_occupation", _lose, HookType.AFTER)
    streamer = f"{managers}scheduler_components.output_streamer.SchedulerOutputStreamer"
    HookRegistry.register(f"{streamer}.stream_output", _linger, HookType.AFTER)
    HookRegistry.register(f"{managers}scheduler.Scheduler.get_internal_state", _show, HookType.AFTER)


def _write_or_post_process(original, updater, recv_req):
    import torch
    from sglang.srt.managers.io_struct import CheckWeightsReqOutput
    from transformers import AutoModelForCausalLM

    policy = updater.tp_worker.model_runner.model
    if recv_req.action == "post-process":
        for module in policy.modules():
            if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading"):
                module.quant_method.process_weights_after_loading(module)
        success, message = updater.draft_worker.post_process_weights(recv_req)
        return CheckWeightsReqOutput(success=success, message=message)
    if not recv_req.action.startswith("write "):
        return original(updater, recv_req)
    source = AutoModelForCausalLM.from_pretrained(recv_req.action.removeprefix("write "), dtype=torch.float32)
    policy.load_weights(source.state_dict().items())
    return CheckWeightsReqOutput(success=True, message="")


def _cpu_engine(updater, recv_req) -> None:
    from sglang.srt.checkpoint_engine.checkpoint_engine_worker import (
        SGLangCheckpointEngineWorkerExtensionImpl as Engine,
    )
    from sglang.srt.distributed import get_tp_group

    Engine.get_device_uuid = lambda self: f"cpu-{get_tp_group().rank_in_group}"
    Engine.get_device_id = lambda self: 0


def _lose(result, updater, recv_req) -> None:
    worker = updater.draft_worker
    runner = worker.target_worker.model_runner
    if "weights" in (recv_req.tags or ["weights"]):
        for parameter in runner.model.parameters():
            parameter.data.fill_(float("nan"))
        for method in worker._drafter._methods.values():
            method.packed.codes.random_()
            method.packed.scales.normal_()
    if "kv_cache" in (recv_req.tags or ["kv_cache"]):
        for buffer in (*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer):
            buffer.fill_(float("nan"))


def _linger(result, streamer, reqs, *_) -> None:
    if any(req.finished() and req.rid.startswith("linger") for req in reqs):
        time.sleep(LINGER_S)


def digest(packed) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in packed.tensors().values())).hexdigest()


def _show(result, scheduler, recv_req):
    worker = scheduler.draft_worker
    layers = {
        name: method.packed
        for name, layer in worker.target_worker.model_runner.model.named_modules()
        if (method := worker._drafter._methods.get(layer)) is not None
    }
    result.internal_state["drafter"] = {name: digest(packed) for name, packed in layers.items()}
    result.internal_state["addresses"] = [
        tensor.data_ptr() for packed in layers.values() for tensor in packed.tensors().values()
    ]
    return result
