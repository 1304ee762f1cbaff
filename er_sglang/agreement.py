"""Ranks of a tensor-parallel server must decide alike, or their collectives no longer match and the server hangs.

They do by construction: decisions depend on host data that all ranks hold. This checks it, at a bounded cost: every
CHECK_EVERY_STEPS steps, before anything is launched, a checksum of everything that went into decisions since the start
is compared over the CPU group. State drifts apart before decisions do, so a drift is an error at the next check; should
a decision differ before that, SGLang's watchdog ends the server.
"""

from __future__ import annotations

from zlib import crc32

import torch
import torch.distributed as dist

CHECK_EVERY_STEPS = 64


class RanksDisagree(RuntimeError):
    """Tensor-parallel ranks saw different batches or verdicts."""


class Agreement:
    """group: the tensor-parallel group's CPU (gloo) process group; None for a single rank, which agrees with itself."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self._digest = 0
        self._steps = 0

    def add(self, fact: object) -> None:
        """Something that decisions depend on; its repr must be exact."""
        if self._group is not None:
            self._digest = crc32(repr(fact).encode(), self._digest)

    def check(self) -> None:
        """Called once a step by every rank; raises RanksDisagree on all of them."""
        self._steps += 1
        if self._group is None or self._steps % CHECK_EVERY_STEPS:
            return
        extremes = torch.tensor([self._digest, -self._digest])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, self._group)
        if extremes[0] != -extremes[1]:
            raise RanksDisagree(
                f"Tensor-parallel ranks disagree on the decode steps up to step {self._steps}: their batches or accepted "
                "counts differ. This is a bug: please report it, with the server's arguments. To go on without drafting, "
                'set "policy": {"mode": "off"}.'
            )
