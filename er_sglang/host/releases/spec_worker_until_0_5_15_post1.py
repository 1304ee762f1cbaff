"""What SGLang wants of a speculative worker that has no draft model of its own."""

from types import SimpleNamespace

from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

SEAMS = """
speculative.base_spec_worker:BaseSpecWorker.war_fastpath_runner self
managers.scheduler:Scheduler._relay_forward_payload self future_indices batch_result
"""


class SpecWorker(BaseSpecWorker):
    # kv_cache_builder.get_draft_kv_pool looks here for a draft's own KV pool. Not named _draft_worker, where SGLang's
    # weights checker would look for a draft's own weights: the drafter's are derived.
    draft_worker = SimpleNamespace(draft_runner=SimpleNamespace(token_to_kv_pool=None))


def dp_rank(ranks) -> int | None:
    """This replica among several; None if there is one. ranks: what a worker is made with besides."""
    return ranks["dp_rank"]
