"""When the drafter follows the policy: once per update, never half, never stale. Pure Python.

One policy update is many calls on any transport, and the q, k and v of one fused layer may arrive in different ones.
So a call only marks the drafter dirty; it is refreshed once, when generation continues, or before the first draft.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Freshness:
    """Is the drafter made of the policy's current weights?

    refresh: re-derives the drafter from the live policy and returns when that is done.
    """

    def __init__(self, refresh: Callable[[], None]) -> None:
        self._refresh = refresh
        self._dirty = False
        self._failed: str | None = None
        self._resident = True
        self.updates = 0
        self.failed_updates = 0
        self.refreshes = 0
        self.refresh_s = 0.0

    @property
    def blocker(self) -> str | None:
        """Why no draft may be made now; None also while dirty, since ``ensure`` mends that."""
        if not self._resident:
            return "weights-released"
        return "update-failed" if self._failed else None

    @property
    def dirty(self) -> bool:
        return self._dirty

    @contextmanager
    def receiving(self, transport: str) -> Iterator[Callable[[bool, str], None]]:
        """Around one call that changes weights; yields a function that takes its outcome (success, message).

        The drafter is dirty from the start. After a failure it stays unused until an update succeeds.
        """
        self._dirty = True
        outcome = [False, "interrupted"]

        def report(success: bool, message: str) -> None:
            outcome[:] = success, message

        try:
            yield report
        finally:
            success, message = outcome
            self.updates += 1
            self._failed = None if success else message
            if not success:
                self.failed_updates += 1
                logger.error(
                    "Policy update by %s failed (%s): serving plain decoding until an update succeeds.",
                    transport,
                    message,
                )

    def released(self) -> None:
        """The weights' memory was given back; what returns on resume is garbage."""
        self._resident = False
        self._dirty = True

    def resumed(self) -> None:
        self._resident = True

    def ensure(self) -> None:
        """Refresh if dirty and allowed; called when generation continues and before a draft."""
        if self._dirty and self.blocker is None:
            start = time.perf_counter()
            self._refresh()
            self._dirty = False
            self.refreshes += 1
            self.refresh_s = time.perf_counter() - start
            logger.info("Drafter refreshed in %.1f ms.", 1e3 * self.refresh_s)
