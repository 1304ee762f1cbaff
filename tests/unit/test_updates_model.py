"""Freshness under any interleaving of what a trainer can do, against the weights themselves and a log of the events.

The policy is three tensors with a version each, the drafter remembers which versions it was made of, and what must hold
is read off those and off the log, not off a second state machine.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from er_sglang.config import UpdatesConfig
from er_sglang.drafting.updates import Freshness

TENSORS = 3
CONFIGS = [
    UpdatesConfig(),
    UpdatesConfig(refresh_interval=2),
    UpdatesConfig(refresh_interval=5, refresh_on_acceptance_drop=0.25),
]
TAGS = st.sets(st.sampled_from(["weights", "kv_cache", "cuda_graph"]), min_size=1)

SELDOM = st.sampled_from([False, False, False, True])


class Broken(Exception):
    """A device error in the middle of a refresh, or of a call."""


class Trainer(RuleBasedStateMachine):
    @initialize(config=st.sampled_from(CONFIGS))
    def start(self, config):
        self.config = config
        self.version = 0
        self.policy = [0] * TENSORS
        self.drafter = [0] * TENSORS
        self.ended = [list(self.policy)]  # the policy at the end of each update, the newest last
        self.drafter_has = 0  # the newest of them that the drafter was made of
        self.log: list[tuple] = []  # ("call", transport, success) and ("end",), which generation's going on writes
        self.released: set[str] = set()
        self.paused = False
        self.in_call = False
        self.acceptance = self.acceptance_when_fresh = 0.9
        self.lost = False  # the drafter's own weights
        self.expected_refreshes = self.refreshes = 0
        self.told = 0
        self.drops = 0
        self.freshness = Freshness(
            config,
            refresh=self._refresh,
            on_update=self._updated,
            acceptance=lambda: {0: self.acceptance},
            window=lambda: 0,
        )

    def _refresh(self):
        assert "weights" not in self.released, "touched weights that are not there"
        assert not self.in_call, "refreshed in the middle of a call"
        assert not self._open(), "refreshed before the update ended"
        assert not self._failed(), "refreshed from a policy that is half an update"
        if self.break_refresh:
            self.drafter[0] = self.policy[0]
            self.lost = True
            raise Broken
        self.drafter, self.drafter_has = list(self.policy), len(self.ended) - 1
        self.lost = False
        self.refreshes += 1

    def _updated(self):
        self.told += 1

    # -- what the log says ------------------------------------------------------------------------------------

    def _open(self) -> bool:
        return bool(self.log) and self.log[-1][0] == "call"

    def _failed(self) -> bool:
        """Of the last update with calls: whether one failed that no later whole policy made good."""
        calls = []
        for event, following in zip(reversed(self.log), [None, *reversed(self.log)]):
            if event[0] == "call":
                calls.append(event)
            elif calls:
                break
        for _, transport, success in calls:  # the newest first
            if not success:
                return True
            if transport == "disk":
                return False
        return False

    def _behind(self) -> int:
        """Ended updates that the drafter does not have."""
        return len(self.ended) - 1 - self.drafter_has

    def _end(self):
        """Generation goes on; called before Freshness is told."""
        if self._behind() == 0:
            self.acceptance_when_fresh = self.acceptance
        self.log.append(("end",))
        self.ended.append(list(self.policy))

    # -- what a trainer does ----------------------------------------------------------------------------------

    def _write(self, tensors):
        self.version += 1
        for tensor in tensors:
            self.policy[tensor] = self.version

    @precondition(lambda self: "weights" not in self.released)
    @rule(
        tensors=st.sets(st.integers(0, TENSORS - 1)),
        outcome=st.sampled_from(["ok", "ok", "ok", "refused", "raises", "unreported"]),
    )
    def bucket(self, tensors, outcome):
        """One call, perhaps empty, that carries some of the tensors; one that fails has written some of them."""
        self._call("tensor", tensors, outcome)

    @precondition(lambda self: "weights" not in self.released)
    @rule(outcome=st.sampled_from(["ok", "refused"]))
    def checkpoint(self, outcome):
        self._call("disk", range(TENSORS), outcome)

    def _call(self, transport, tensors, outcome):
        self.in_call = True
        try:
            with self.freshness.receiving(transport) as report:
                assert self.freshness.dirty
                self._write(tensors)
                if outcome == "raises":
                    raise Broken
                if outcome != "unreported":
                    report(outcome == "ok", "")
        except Broken:
            pass
        self.in_call = False
        self.log.append(("call", transport, outcome == "ok"))
        assert self.freshness.dirty

    @precondition(lambda self: self.paused and "weights" not in self.released)
    @rule(tensors=st.sets(st.integers(0, TENSORS - 1), min_size=1))
    def direct_write(self, tensors):
        """Parameters written behind SGLang's back."""
        self._write(tensors)

    @precondition(lambda self: not self.paused)
    @rule()
    def pause(self):
        self.paused = True

    @rule(breaks=SELDOM)
    def continue_generation(self, breaks):
        self.paused = False
        self._end()
        self._tell(self.freshness.continued, breaks)

    @precondition(lambda self: not self.paused and not self.released)
    @rule(
        steps=st.lists(st.booleans(), min_size=1, max_size=4),
        breaks=SELDOM,
        acceptance=st.sampled_from([0.9, 0.7, 0.5]),
    )
    def generate(self, steps, breaks, acceptance):
        """Decode steps that would draft, or would not anyway; then their acceptance is known."""
        for drafts in steps:
            if self._open():
                self._end()
            self.freshness.close_update()
            blocker = self.freshness.blocker
            assert blocker == ("update-failed" if self._failed() else None)
            if blocker is None and drafts and self._tell(self.freshness.ensure, breaks):
                self._draft()
            self.acceptance = acceptance

    def _tell(self, what, breaks: bool) -> bool:
        """Call Freshness where it may refresh, and let that break; False if it did."""
        before, self.break_refresh = self.refreshes, breaks
        needed = self.lost or self._behind() >= self.config.refresh_interval
        fell = (
            self._behind() > 0 and self.acceptance_when_fresh - self.acceptance > self.config.refresh_on_acceptance_drop
        )
        due = (needed or fell) and not self._failed() and "weights" not in self.released
        try:
            what()
        except Broken:
            assert breaks and due
            return False
        assert self.refreshes - before == due, "once, and only then"
        self.drops += due and not needed
        return True

    def _draft(self):
        assert not self.lost and "weights" not in self.released
        assert self.drafter == self.ended[self.drafter_has], "drafted with half an update"
        if self.config.refresh_interval == 1:
            assert self.drafter == self.policy, "drafted with a stale drafter"
        assert self._behind() < self.config.refresh_interval

    @rule(tags=TAGS)
    def release(self, tags):
        self.released |= tags
        if "weights" in self.released:
            self.freshness.released()
            self.lost = True
            self.drafter = [-1] * TENSORS

    @precondition(lambda self: self.released)
    @rule(tags=TAGS | st.just({"weights", "kv_cache", "cuda_graph"}))
    def resume(self, tags):
        self.released -= tags
        if "weights" not in self.released:
            self.freshness.resumed()

    # -- what must hold at any time ---------------------------------------------------------------------------

    @invariant()
    def counters(self):
        snapshot = self.freshness.snapshot()
        calls = [event for event in self.log if event[0] == "call"]
        assert snapshot["update_calls"] == len(calls)
        assert snapshot["updates"] == len(self.ended) - 1
        assert snapshot["failed_updates"] == _failed_updates(self.log)
        assert snapshot["refreshes"] == self.refreshes
        assert snapshot["updates_behind"] == self._behind()
        assert self.told == snapshot["updates"] + self.drops, "acceptance ages once per update"
        assert snapshot["dirty"] == (self._open() or self.lost or self._behind() > 0)
        assert (self.freshness.blocker == "weights-released") == ("weights" in self.released)


def _failed_updates(log) -> int:
    """Runs of calls with a failure; a whole policy starts a run of its own."""
    runs: list[list[bool]] = []
    for previous, event in zip([("end",), *log], log):
        if event[0] == "call":
            if previous[0] == "end" or event[1] == "disk":
                runs.append([])
            runs[-1].append(event[2])
    return sum(not all(run) for run in runs)


SETTINGS = settings(max_examples=400, stateful_step_count=50, suppress_health_check=list(HealthCheck))


def test_any_interleaving():
    run_state_machine_as_test(Trainer, settings=SETTINGS)
