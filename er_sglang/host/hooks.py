"""Hooks into SGLang's functions, bound only where SELF_QUANT is served: a plain server runs SGLang's own.

A scheduler binds its hooks when it makes our worker, a front end when it makes its tokenizer manager. SGLang's registry
applies hooks once, after plugins have loaded and before anybody knows what will be served, and only logs a hook that
it cannot apply. So ours are applied by themselves, each with what the registry applies hooks with, and a failure ends
the start.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from math import ceil

import torch
from sglang.srt.managers.io_struct import PauseGenerationReqInput
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from er_sglang.host.emission import FRONT_END_EMISSION_HOOKS, SCHEDULER_EMISSION_HOOKS
from er_sglang.host.penalties import PENALTY_HOOKS
from er_sglang.host.processes import PROCESS_HOOKS
from er_sglang.host.releases import adapter
from er_sglang.host.reservation import RESERVATION_HOOKS
from er_sglang.host.riders import reason_to_ride
from er_sglang.host.seams import ALGORITHM, UnsupportedHost, asks_for_us
from er_sglang.host.served import ServedWorker
from er_sglang.steering.control import KEY, spelled_out

_control, _pause, _settings, _slots, _updates = map(adapter, ("control", "pause", "settings", "slots", "updates"))

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler."
_RESULTS = "sglang.srt.managers.scheduler_components.batch_result_processor.SchedulerBatchResultProcessor."
_FRONT_END = "sglang.srt.managers.tokenizer_manager.TokenizerManager."


def _all_agree(success: bool, group) -> bool:
    """Whether every rank succeeded: they must agree on whether to draft."""
    everywhere = torch.tensor(success, dtype=torch.int32)
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group=group)
    return bool(everywhere)


def _settle(scheduler) -> None:
    """Let a scheduler whose requests have all been answered be idle.

    When it answers the last one, SGLang has launched one more step already, or has not put the batch away. Until it has,
    it takes itself for busy, and an update that is to flush the cache ends the server; so does a release of memory. A
    trainer that aborts all requests first is as fast as that now and then, and a cycle takes longer than a plain step.
    """
    batches = [batch for batch in (scheduler.running_batch, scheduler.last_batch) if batch]
    if scheduler.chunked_req or not all(req.finished() for batch in batches for req in batch.reqs):
        return
    before = {name: getattr(scheduler, name) for name in _pause.STATE}
    scheduler.pause_generation(PauseGenerationReqInput(mode="retract"))  # of these requests there is nothing to retract
    vars(scheduler).update(before)


def _receive_update(transport: str):
    def hook(original, updater, recv_req):
        worker: ServedWorker = updater.draft_worker
        if recv_req.flush_cache:
            _settle(updater.scheduler)
        worker.synchronize()  # A cycle in flight ends on the weights it began with.
        with worker.freshness.receiving(transport) as report:
            result = original(updater, recv_req)
            report(_all_agree(result.success, updater.tp_cpu_group), result.message)
        return result

    return hook


def _release_memory(original, updater, recv_req):
    _settle(updater.scheduler)
    result = original(updater, recv_req)
    if "weights" in updater.offload_tags:
        updater.draft_worker.freshness.released()
    return result


def _resume_memory(original, updater, recv_req):
    result = original(updater, recv_req)
    if "weights" not in updater.offload_tags:
        updater.draft_worker.freshness.resumed()
    return result


def _continue_generation(result, scheduler, recv_req) -> None:
    scheduler.draft_worker.freshness.continued()


def _on_idle(result, scheduler) -> None:
    worker: ServedWorker = scheduler.draft_worker
    if worker.busy and scheduler.is_fully_idle():
        worker.idle()


def _internal_state(result, scheduler, recv_req):
    result.internal_state[KEY] = scheduler.draft_worker.snapshot()
    return result


def _set_internal_state(original, scheduler, recv_req):
    """A change of our settings is ours; all else is SGLang's. The HTTP answer is the list of ``updated``, one a
    replica."""
    wanted = spelled_out(recv_req.server_args)
    if KEY not in wanted:
        return original(scheduler, recv_req)
    return _control.answer(scheduler.draft_worker.change_settings(wanted))


def _count_drafts(tokens, processor, result, batch) -> None:
    """SGLang has no count of a request's drafted tokens: it assumes one gamma for all steps. They travel to the front
    end as ``spec_num_correct_drafts``, which can spare the field: the histogram of accepted drafts says the same."""
    gamma = result.speculative_num_draft_tokens - 1
    if gamma == 0:
        return
    for req, accepted in zip(batch.reqs, result.num_correct_drafts_per_req_cpu):
        if not (req.is_retracted or req.finished() or reason_to_ride(req)):
            req.spec_num_correct_drafts += gamma - accepted


def _report_drafts(result, manager, meta_info, recv_obj, i) -> None:
    """Make the counts in a finished request's ``meta_info`` true, and add the names by which slime asks for them.

    ``spec_verify_ct`` stays the number of decode steps, plain ones included, and ``spec_accept_length`` the tokens per
    such step. ``spec_accept_rate``, accepted over drafted tokens, is left out if nothing was drafted.
    """
    if not asks_for_us(manager.server_args) or "spec_verify_ct" not in meta_info:
        return
    drafted = recv_obj.spec_num_correct_drafts[i]
    accepted = sum(count * steps for count, steps in enumerate(recv_obj.spec_correct_drafts_histogram[i]))
    for name in ("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num"):
        meta_info[name] = drafted
    for name in ("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num"):
        meta_info[name] = accepted
    if drafted:
        meta_info["spec_accept_rate"] = accepted / drafted
    else:
        del meta_info["spec_accept_rate"]


def _request_row_headroom(result, *_):
    """Columns of the request table beyond the context length. SGLang reserves KV slots for two cycles at every step but
    counts one: from gamma 8 on, a request that nears the limit would write into the row of another. Rounded up: page
    tables are made as wide as a row, and kernels fill them faster if they are aligned, as they are without us."""
    return ceil((result + _settings.published().speculative_num_draft_tokens) / 16) * 16


Hooks = Mapping[str, tuple[HookType, Callable]]

SCHEDULER_HOOKS: Hooks = {
    **{
        f"{_UPDATER}update_weights_from_{transport}": (HookType.AROUND, _receive_update(transport))
        for transport in ("disk", "distributed", "tensor", "ipc")
    },
    f"{_UPDATER}release_memory_occupation": (HookType.AROUND, _release_memory),
    f"{_UPDATER}resume_memory_occupation": (HookType.AROUND, _resume_memory),
    f"{_SCHEDULER}continue_generation": (HookType.AFTER, _continue_generation),
    f"{_SCHEDULER}on_idle": (HookType.AFTER, _on_idle),
    f"{_SCHEDULER}get_internal_state": (HookType.AFTER, _internal_state),
    f"{_SCHEDULER}set_internal_state": (HookType.AROUND, _set_internal_state),
    f"{_RESULTS}_resolve_spec_v2_tokens": (HookType.AFTER, _count_drafts),
    _slots.ROW_HEADROOM: (HookType.AFTER, _request_row_headroom),
    **_updates.HOOKS,
    **SCHEDULER_EMISSION_HOOKS,
    **RESERVATION_HOOKS,
    **PENALTY_HOOKS,
}
# A process may hold front ends of several servers, not all of them ours: these hooks ask whose they are, or change nothing
# that a plain server would notice.
FRONT_END_HOOKS: Hooks = {
    f"{_FRONT_END}_calculate_spec_decoding_metrics": (HookType.AFTER, _report_drafts),
    **FRONT_END_EMISSION_HOOKS,
}


def _bind_front_end(manager) -> None:
    if asks_for_us(manager.server_args):
        bind(FRONT_END_HOOKS)


# The hooks of plain servers, on lines of their start.
GATE: Hooks = {f"{_FRONT_END}init_request_dispatcher": (HookType.BEFORE, _bind_front_end), **PROCESS_HOOKS}


def bind(hooks: Hooks) -> None:
    """Put every hook in its place, unless it is there; UnsupportedHost if one does not fit."""
    for target, (kind, hook) in hooks.items():
        try:
            if not _reaches(pkgutil.resolve_name(target), hook):
                HookRegistry._apply_target(target, [(kind, hook, HookSource("self_quant", "er_sglang"))])
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UnsupportedHost(
                f"{ALGORITHM} cannot hook {target} ({error}): another plugin or a patch of SGLang has changed it. "
                "Serve without that, or without --speculative-algorithm."
            ) from error


def _reaches(function: Callable, hook: Callable) -> bool:
    """Whether a call of ``function`` comes by ``hook``, which the registry's wrapper keeps in a cell."""
    while function is not None:
        if any(cell.cell_contents is hook for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
