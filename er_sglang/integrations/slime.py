"""slime: how far the drafts of a rollout carried, pooled over its samples. ``launch/slime`` has the rest.

    --custom-rollout-log-function-path er_sglang.integrations.slime.log_rollout

slime's own ``rollout/spec_accept_rate`` is a mean of ratios, one per sample, in which a sample that was never drafted
for counts as zero. Knows neither slime nor SGLang.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger(__name__)


def log_rollout(
    rollout_id: int, args: Any, samples: Sequence[Any], extra_metrics: dict | None, rollout_time: float
) -> bool:
    """Add our metrics to those of the rollout, and leave the rest to slime (False).

    rollout/self_quant_accept_rate: accepted over drafted tokens, absent if nothing was drafted.
    rollout/self_quant_gamma: drafted tokens per request and decode step, plain steps counting as 0.
    rollout/self_quant_tokens_per_step: emitted tokens per request and decode step; 1 is plain decoding.

    samples: slime's, flat; of each, the counts in ``spec_info``. slime collects them only if
        ``--sglang-speculative-algorithm`` is set, also where the engines are external.
    extra_metrics: None from rollout functions of slime's old style, such as its fully asynchronous example: the metrics
        are then in the log only.
    """
    infos = [sample.spec_info for sample in samples]
    steps = sum(info.spec_verify_ct for info in infos)
    drafted = sum(info.spec_draft_token_num for info in infos)
    accepted = sum(info.spec_accept_token_num for info in infos)
    metrics = {}
    if drafted:
        metrics["rollout/self_quant_accept_rate"] = accepted / drafted
    if steps:
        metrics["rollout/self_quant_gamma"] = drafted / steps
        metrics["rollout/self_quant_tokens_per_step"] = 1 + accepted / steps
    logger.info("rollout %s: %s", rollout_id, metrics)
    if extra_metrics is not None:
        extra_metrics.update(metrics)
    return False
