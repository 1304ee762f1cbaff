"""What SGLang wants of a speculative worker that has no draft model of its own."""

from types import SimpleNamespace

from sglang.srt.speculative.base_spec_worker import BaseSpecWorker

SEAMS = """
speculative.base_spec_worker:BaseSpecWorker.__init__ self
speculative.base_spec_worker:BaseSpecWorker.war_fastpath_runner self
mem_cache.kv_cache_builder:get_draft_kv_pool draft_worker spec_algorithm server_args
managers.scheduler:Scheduler._relay_forward_payload self future_indices batch_result
"""

# get_draft_kv_pool looks here for a draft's own KV pool.
_POOLLESS = SimpleNamespace(
    draft_runner=SimpleNamespace(token_to_kv_pool=None),
    weight_load_time=0.0,
    graph_memory_usage={},
    graph_time_usage={},
)


class SpecWorker(BaseSpecWorker):
    draft_worker = _POOLLESS


def dp_rank(ranks) -> int | None:
    """This replica among several; None if there is one. ranks: what a worker is made with besides."""
    return ranks["ps"].dp_rank
