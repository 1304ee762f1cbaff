"""What one decode step reads of a batch, gathered once."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

import torch

from er_sglang.cycle.slots import next_slots
from er_sglang.host.releases import adapter
from er_sglang.sampling import Penalties, SamplingParams

_settings, _slots = adapter("settings"), adapter("slots")


@dataclass(slots=True)
class Step:
    """Inputs of a step for B requests; L is a request's committed length, the KV entries it has.

    req_pool_indices_B: int64, rows of ``req_to_token``.
    seq_lens_B: int64, L on the device.
    seq_lens_cpu_B: int64 on the host; L, or an upper bound of it where the attention backend needs no more.
    last_B: int64, the last emitted token; its KV entry belongs at position L and is not written yet.
    positions_NB: int64 [gamma + 1, B]: L, L + 1, ...
    slots_NB: int64 [gamma + 1, B], KV slots of these positions, reserved by the scheduler. Both are request-major in
        memory, as a verify has its tokens.
    params: sampling settings.
    rides_B: bool, requests that ride along (host/riders.py); None if none does.
    penalties: the counts of penalised requests; None if none is.
    bias_BV: float32, logit bias; None if no request has one.
    """

    req_pool_indices_B: torch.Tensor
    seq_lens_B: torch.Tensor
    seq_lens_cpu_B: torch.Tensor
    last_B: torch.Tensor
    positions_NB: torch.Tensor
    slots_NB: torch.Tensor
    params: SamplingParams
    rides_B: torch.Tensor | None = None
    penalties: Penalties | None = None
    bias_BV: torch.Tensor | None = None

    @property
    def batch_size(self) -> int:
        return self.seq_lens_B.shape[0]

    @classmethod
    def of_batch(
        cls,
        batch,
        req_to_token: torch.Tensor,
        width: int,
        host_slack_tokens: int,
        riding: Collection[int] = (),
        penalties: Penalties | None = None,
    ) -> Step:
        """Read a ``ScheduleBatch``; ``width`` slots per request, the rows of those that ride along, and their counts.

        Where the scheduler keeps no host copy of the lengths, they are bounded by what it has committed plus
        ``host_slack_tokens``, the most that the step still in flight can emit.
        """
        seq_lens_B = batch.seq_lens
        if batch.seq_lens_cpu is not None:
            seq_lens_cpu_B = batch.seq_lens_cpu
        else:
            committed = array("q", [_slots.committed(req) for req in batch.reqs])  # torch.tensor(list) takes its time
            seq_lens_cpu_B = torch.frombuffer(committed, dtype=torch.int64) + host_slack_tokens
        positions_NB, slots_NB = next_slots(req_to_token, batch.req_pool_indices, seq_lens_B, width)
        info = batch.sampling_info
        # SGLang's CUDA sampler (sampler.py) filters every row of a batch in sequence while one has min-p.
        sequential = info.need_min_p_sampling and _settings.sampling_backend() == "flashinfer"
        rides_B = None
        if riding:
            rides_B = torch.tensor([row in riding for row in range(len(batch.reqs))]).to(
                seq_lens_B.device, non_blocking=True
            )
        return cls(
            req_pool_indices_B=batch.req_pool_indices,
            seq_lens_B=seq_lens_B,
            seq_lens_cpu_B=seq_lens_cpu_B,
            last_B=batch.spec_info.bonus_tokens.to(torch.int64),
            positions_NB=positions_NB,
            slots_NB=slots_NB,
            params=SamplingParams(
                temperature_B=info.temperatures.view(-1),
                top_k_B=info.top_ks,
                top_p_B=info.top_ps,
                min_p_B=info.min_ps,
                sequential_B=_flags(sequential, len(seq_lens_B), seq_lens_B.device),
            ),
            rides_B=rides_B,
            penalties=penalties,
            bias_BV=info.logit_bias,
        )


@cache
def _flags(value: bool, batch: int, device: torch.device) -> torch.Tensor:
    return torch.full((batch,), value, device=device)
