"""Policy updates: calls for the policy's runners, and marks around those that come in buckets."""

from sglang.srt.plugins.hook_registry import HookType

_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."

SEAMS = """
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.begin_weight_update self recv_req
managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager.end_weight_update self recv_req
"""


def _begin(result, updater, recv_req) -> None:
    if result.success:
        updater.draft_worker.freshness.began()


def _end(result, updater, recv_req) -> None:
    if result.success:
        updater.draft_worker.freshness.ended()


HOOKS = {
    f"{_UPDATER}begin_weight_update": (HookType.AFTER, _begin),
    f"{_UPDATER}end_weight_update": (HookType.AFTER, _end),
}


class TakesUpdates:
    """A draft worker's part in an update: none, it has no runner."""
