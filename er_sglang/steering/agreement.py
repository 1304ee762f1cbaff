"""Ranks of a tensor-parallel server must decide alike, or their collectives no longer match and the server hangs.

They do by construction: decisions depend on host data that all ranks hold. This checks it, at a bounded cost: every
CHECK_EVERY_STEPS steps, before anything is launched, a checksum of everything that went into decisions since the start
is compared over the CPU group. State drifts apart before decisions do, so a drift is an error at the next check; should
a decision differ before that, SGLang's watchdog ends the server. Settings, which every node reads for itself, are
compared at the start.
"""

from __future__ import annotations

from zlib import crc32

import torch
import torch.distributed as dist

from er_sglang.config import CONFIG_ENV, SIMULATE_ACCEPTANCE_ENV
from er_sglang.errors import ConfigError

CHECK_EVERY_STEPS = 64


class RanksDisagree(RuntimeError):
    """Tensor-parallel ranks saw different batches or verdicts."""


def _all_equal(number: int, group: dist.ProcessGroup) -> bool:
    """Whether every rank holds the same number; all of them learn it."""
    extremes = torch.tensor([number, -number])
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
    return bool(extremes[0] == -extremes[1])


def check_settings(settings: object, group: dist.ProcessGroup | None) -> None:
    """Raise ConfigError on every rank unless all have read the same; `settings`' repr must be exact."""
    if group is not None and not _all_equal(crc32(repr(settings).encode()), group):
        raise ConfigError(
            f"the nodes of this engine read different settings; this one's are {settings}. "
            f"Set {CONFIG_ENV}, or the file, and {SIMULATE_ACCEPTANCE_ENV} alike on all of them."
        )


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

    def check(self) -> bool:
        """Called once a step by every rank; raises RanksDisagree on all of them. Returns whether this was a step to
        compare at."""
        self._steps += 1
        if self._steps % CHECK_EVERY_STEPS:
            return False
        if self._group is not None and not _all_equal(self._digest, self._group):
            raise RanksDisagree(
                f"Tensor-parallel ranks disagree on the decode steps up to step {self._steps}: their batches or "
                "accepted counts differ. This is a bug: please report it, with the server's arguments. To go on "
                'without drafting, set "policy": {"mode": "off"}.'
            )
        return True

    def of_first(self, number: float) -> float:
        """The first rank's, on every rank; all of them call it."""
        if self._group is None:
            return number
        shared = torch.tensor([number], dtype=torch.float64)
        dist.broadcast(shared, dist.get_global_rank(self._group, 0), self._group)
        return shared.item()
