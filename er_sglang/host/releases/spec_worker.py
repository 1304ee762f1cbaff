"""What SGLang wants of a speculative worker that has no draft model of its own."""

from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

SEAMS = """
speculative.base_spec_worker:BaseSpecWorker.__init__ self
speculative.base_spec_worker:BaseSpecWorker.last_shared_read_runner self
speculative.base_spec_worker:BaseSpecWorker.weight_update_runners self
managers.scheduler:Scheduler._relay_forward_payload self batch future_indices batch_result
"""


class SpecWorker(BaseSpecWorker):
    draft_worker = None


def dp_rank(ranks) -> int | None:
    """This replica among several; None if there is one. ranks: what a worker is made with besides."""
    return get_parallel().dp_rank
