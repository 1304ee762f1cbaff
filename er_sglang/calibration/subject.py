"""What is measured: the phases of a step, and the server that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from er_sglang.config import SelfQuantConfig
from er_sglang.sampling import RandomState


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """decode(batch, step): a plain decode step of a ScheduleBatch.
    draft(step, rung), verify(batch, step, draft): the two parts of a cycle.
    runner, server_args: SGLang's ModelRunner of the policy, and its settings.
    req_to_token: int32 [rows, context], SGLang's request table.
    random: advanced by every draft.
    graph_batches, target_graph_batches: batch sizes with graphs, of drafts and verifies, and of plain decoding.
    """

    decode: Callable
    draft: Callable
    verify: Callable
    runner: object
    server_args: object
    config: SelfQuantConfig
    req_to_token: torch.Tensor
    random: RandomState
    graph_batches: list[int]
    target_graph_batches: list[int]

    @property
    def device(self) -> torch.device:
        return self.req_to_token.device
