"""When the drafter follows the policy: once per update, never half, never stale but by the user's wish. Pure Python.

One policy update is everything that happens to the policy's weights between two moments of generation: any number of
calls by any transport (the q, k and v of one fused layer may arrive in different ones), direct writes that nobody
reports, or both. It ends when generation goes on, at `continue_generation` or at the next decode step, and only then is
the drafter refreshed, once. Of writes that nobody reports, `continue_generation` alone knows. If one of its calls
failed, the update failed: nothing is drafted until a later one succeeds.

    receiving() ...   continued() or close_update() ensure()
    update open  -->  update ended             -->  refreshed, if due

Where a trainer marks the begin and the end of an update (SGLang since 0.5.21), it ends there: began() ... ended().
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum

from er_sglang.config import UpdatesConfig

logger = logging.getLogger(__name__)

# One call by these carries the whole policy, so it makes good whatever an earlier one left behind.
WHOLE_POLICY = ("disk", "ipc")


class RefreshReason(str, Enum):
    """Why the drafter is refreshed."""

    LOST = "its weights were lost"
    DUE = "the policy was updated"
    DROP = "acceptance fell"


def refresh_reason(
    config: UpdatesConfig, *, whole: bool, behind: int, acceptance: float, fresh_acceptance: float
) -> RefreshReason | None:
    """Why the drafter is to be refreshed now, None if it need not be.

    whole: its weights are those of one policy, this one or an earlier one.
    behind: updates that have ended since it was refreshed.
    acceptance: of its drafts, now. fresh_acceptance: of such drafts before the first of those updates.
    """
    if not whole:
        return RefreshReason.LOST
    if behind >= config.refresh_interval:
        return RefreshReason.DUE
    if behind and fresh_acceptance - acceptance > config.refresh_on_acceptance_drop:
        return RefreshReason.DROP
    return None


class Freshness:
    """Which policy the drafter is made of, and whether it may be used.

    refresh: re-derives the drafter from the live policy and returns when that is done.
    on_update: called when what was learned of its acceptance says less: once per update, and when it was refreshed
        because acceptance fell.
    acceptance: live acceptance of the first drafted token, by attention window. window: that of the latest drafts.
    """

    def __init__(
        self,
        config: UpdatesConfig,
        *,
        refresh: Callable[[], None],
        on_update: Callable[[], None],
        acceptance: Callable[[], Mapping[int, float]],
        window: Callable[[], int],
    ) -> None:
        self._config = config
        self._refresh = refresh
        self._on_update = on_update
        self._acceptance = acceptance
        self._window = window
        self._open = False
        self._marked = False  # the open update will have its end marked
        self._ended = False  # its end was marked, and no step came since
        self._failed = False  # the update that is open, or the last one
        self._resident = True
        self._whole = True
        self._behind = 0
        self._fresh_acceptance: Mapping[int, float] = {}
        self.update_calls = 0
        self.updates = 0
        self.failed_updates = 0
        self.refreshes = 0
        self.refresh_s = 0.0

    @property
    def blocker(self) -> str | None:
        """Why no draft may be made now; None where ``ensure`` mends what there is."""
        if not self._resident:
            return "weights-released"
        return "update-failed" if self._failed else None

    @property
    def dirty(self) -> bool:
        """Whether the drafter is made of other weights than the policy's current ones."""
        return self._open or self._behind > 0 or not self._whole

    def snapshot(self) -> dict:
        """Plain values for /server_info. updates_behind: ended updates that the drafter does not have."""
        return {
            "update_calls": self.update_calls,
            "updates": self.updates,
            "failed_updates": self.failed_updates,
            "updates_behind": self._behind,
            "refreshes": self.refreshes,
            "refresh_s": self.refresh_s,
            "dirty": self.dirty,
        }

    @contextmanager
    def receiving(self, transport: str) -> Iterator[Callable[[bool, str], None]]:
        """Around one call that changes weights; yields a function that takes its outcome (success, message).

        A call that raises, or that reports nothing, has failed.
        """
        if not self._open or transport in WHOLE_POLICY:
            self._open, self._failed = True, False
        self.update_calls += 1
        outcome = [False, "interrupted"]

        def report(success: bool, message: str) -> None:
            outcome[:] = success, message

        try:
            yield report
        finally:
            success, message = outcome
            if not success:
                self.failed_updates += not self._failed
                self._failed = True
                logger.error(
                    "Policy update by %s failed (%s): serving plain decoding until an update succeeds.",
                    transport,
                    message,
                )

    def began(self) -> None:
        """An update begins whose end will be marked."""
        self._open, self._failed, self._marked = True, False, True

    def ended(self) -> None:
        """The end of an update."""
        self._marked = False
        self._end_update()
        self.ensure()
        self._ended = True

    def released(self) -> None:
        """The weights' memory was given back; what returns on resume is garbage."""
        self._resident = self._whole = False

    def resumed(self) -> None:
        """The weights' memory is back."""
        self._resident = True

    def continued(self) -> None:
        """Generation continues after a pause, in which weights may have been written without any call: an update
        ends, unless its end was marked or will be."""
        if not (self._ended or self._marked):
            self._end_update()
        self._ended = False
        self.ensure()

    def close_update(self) -> None:
        """A decode step comes next, so an update that is open ends, unless its end will be marked."""
        self._ended = False
        if self._open and not self._marked:
            self._end_update()

    def ensure(self) -> None:
        """Refresh if due and allowed; before every draft."""
        if not self.dirty or self.blocker is not None:
            return
        window = self._window()
        reason = refresh_reason(
            self._config,
            whole=self._whole,
            behind=self._behind,
            acceptance=self._acceptance()[window],
            fresh_acceptance=self._fresh_acceptance.get(window, 0.0),
        )
        if reason is None:
            return
        start_s = time.perf_counter()
        self._whole = False
        self._refresh()
        self._whole = True
        self._behind = 0
        self.refreshes += 1
        self.refresh_s = time.perf_counter() - start_s
        if reason is RefreshReason.DROP:
            self._on_update()
        logger.info("Drafter refreshed in %.1f ms: %s.", 1e3 * self.refresh_s, reason.value)

    def _end_update(self) -> None:
        if not self._behind:
            self._fresh_acceptance = self._acceptance()
        self._open = False
        self.updates += 1
        self._behind += 1
        self._on_update()
