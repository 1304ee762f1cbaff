"""When a refresh is due, and what becomes of an update whose calls fail: by example."""

import json
import logging

import pytest

from er_sglang.config import CONFIG_ENV, UpdatesConfig, load_config
from er_sglang.drafting.updates import Freshness, RefreshReason, refresh_reason
from er_sglang.errors import ConfigError


def freshness(acceptance=lambda: 0.9, **settings):
    """And the list of what it did: "refresh" or "changed"."""
    done = []
    return done, Freshness(
        UpdatesConfig(**settings),
        refresh=lambda: done.append("refresh"),
        on_update=lambda: done.append("changed"),
        acceptance=lambda: {0: acceptance(), 256: 0.5},
        window=lambda: 0,
    )


def decode_step(drafter):
    """A decode step comes next; why it must not draft."""
    drafter.close_update()
    return drafter.blocker


def call(drafter, success=True, transport="tensor"):
    with drafter.receiving(transport) as report:
        report(success, "")


@pytest.mark.parametrize(
    ("settings", "facts", "expected"),
    [
        ({}, {"behind": 0}, None),
        ({}, {"behind": 1}, RefreshReason.DUE),
        ({}, {"behind": 0, "whole": False}, RefreshReason.LOST),
        ({"refresh_interval": 3}, {"behind": 2}, None),
        ({"refresh_interval": 3}, {"behind": 3}, RefreshReason.DUE),
        ({"refresh_interval": 3}, {"behind": 1, "whole": False}, RefreshReason.LOST),
        ({"refresh_interval": 3}, {"behind": 1, "acceptance": 0.0}, None),
        ({"refresh_interval": 3, "refresh_on_acceptance_drop": 0.1}, {"behind": 1, "acceptance": 0.85}, None),
        (
            {"refresh_interval": 3, "refresh_on_acceptance_drop": 0.1},
            {"behind": 1, "acceptance": 0.75},
            RefreshReason.DROP,
        ),
        ({"refresh_interval": 3, "refresh_on_acceptance_drop": 0.1}, {"behind": 0, "acceptance": 0.75}, None),
    ],
)
def test_when_a_refresh_is_due(settings, facts, expected):
    facts = {"whole": True, "acceptance": 0.9, "fresh_acceptance": 0.9, **facts}
    assert refresh_reason(UpdatesConfig(**settings), **facts) is expected


def test_many_calls_are_one_update():
    done, drafter = freshness()
    for _ in range(3):
        call(drafter)
    assert drafter.dirty and done == []
    drafter.continued()
    assert not drafter.dirty and done == ["changed", "refresh"]
    assert decode_step(drafter) is None
    drafter.ensure()
    assert done == ["changed", "refresh"]
    assert (drafter.update_calls, drafter.updates, drafter.refreshes) == (3, 1, 1)


def test_an_update_that_nobody_reports():
    done, drafter = freshness()
    drafter.continued()
    assert done == ["changed", "refresh"]


def test_one_failed_call_fails_the_update(caplog):
    done, drafter = freshness()
    call(drafter)
    with caplog.at_level(logging.ERROR):
        call(drafter, success=False, transport="distributed")
    assert "update by distributed failed" in caplog.text and "plain decoding" in caplog.text
    call(drafter)
    drafter.continued()
    assert decode_step(drafter) == "update-failed" and "refresh" not in done
    drafter.continued()
    assert decode_step(drafter) == "update-failed", "continuing once more brings no weights"
    call(drafter)
    drafter.continued()
    assert decode_step(drafter) is None and drafter.failed_updates == 1 and done.count("refresh") == 1


def test_the_whole_policy_at_once_makes_good_a_failed_call():
    _, drafter = freshness()
    call(drafter, success=False)
    call(drafter, transport="disk")
    drafter.continued()
    assert decode_step(drafter) is None


def test_a_call_that_raises_has_failed():
    _, drafter = freshness()
    with pytest.raises(ZeroDivisionError), drafter.receiving("tensor"):
        1 / 0
    assert decode_step(drafter) == "update-failed"


def test_nothing_is_touched_while_released():
    done, drafter = freshness()
    call(drafter)
    drafter.released()
    drafter.continued()
    assert drafter.blocker == "weights-released" and "refresh" not in done
    drafter.resumed()
    drafter.ensure()
    assert done.count("refresh") == 1


def test_another_window_is_no_drop_of_acceptance():
    live, window, done = {0: 0.9, 256: 0.7}, [0], []
    drafter = Freshness(
        UpdatesConfig(refresh_interval=10, refresh_on_acceptance_drop=0.1),
        refresh=lambda: done.append("refresh"),
        on_update=lambda: None,
        acceptance=lambda: dict(live),
        window=lambda: window[0],
    )
    call(drafter)
    drafter.continued()
    window[0] = 256
    drafter.ensure()
    assert done == []
    live[256] = 0.55
    drafter.ensure()
    assert done == ["refresh"]


def test_a_drop_of_acceptance_is_measured_against_the_fresh_drafter():
    live = [0.9]
    done, drafter = freshness(lambda: live[0], refresh_interval=10, refresh_on_acceptance_drop=0.1)
    for live[0] in (0.9, 0.85, 0.82):
        drafter.continued()
    assert "refresh" not in done
    live[0] = 0.79
    drafter.ensure()
    assert done == ["changed"] * 3 + ["refresh", "changed"]
    live[0] = 0.6  # of a drafter that is up to date: a refresh would not help
    drafter.ensure()
    assert done.count("refresh") == 1


@pytest.mark.parametrize(
    ("updates", "named"),
    [
        ({"refresh_interval": 0}, "refresh_interval is 0"),
        ({"refresh_interval": 2, "refresh_on_acceptance_drop": 0.0}, "refresh_on_acceptance_drop is 0.0"),
        ({"refresh_on_acceptance_drop": 0.1}, "no effect"),
        ({"interval": 2}, "updates: unknown setting interval"),
    ],
)
def test_refused_settings(updates, named):
    with pytest.raises(ConfigError, match=named):
        load_config(None, None, {CONFIG_ENV: json.dumps({"updates": updates})})


def test_settings_arrive():
    config = load_config(
        None, None, {CONFIG_ENV: '{"updates": {"refresh_interval": 4, "refresh_on_acceptance_drop": 0.2}}'}
    )
    assert config.updates == UpdatesConfig(refresh_interval=4, refresh_on_acceptance_drop=0.2)
    assert load_config(None, None, {}).updates.refresh_interval == 1


def test_an_update_whose_end_is_marked():
    """No step between its calls ends it, nor does the continuation afterwards count as another."""
    done, drafter = freshness()
    drafter.began()
    for _ in range(2):
        call(drafter)
        assert decode_step(drafter) is None
        drafter.ensure()
    assert drafter.dirty and done == []
    drafter.ended()
    assert done == ["changed", "refresh"] and not drafter.dirty
    drafter.continued()
    assert done == ["changed", "refresh"] and drafter.updates == 1
    decode_step(drafter)
    drafter.continued()  # after a pause without marks, in which weights may have been written
    assert done == ["changed", "refresh"] * 2


def test_a_marked_update_that_fails_blocks_until_the_next():
    done, drafter = freshness()
    drafter.began()
    call(drafter, success=False)
    call(drafter)
    drafter.ended()
    assert decode_step(drafter) == "update-failed" and done == ["changed"]
    drafter.began()
    call(drafter)
    drafter.ended()
    assert decode_step(drafter) is None and done == ["changed"] * 2 + ["refresh"]
