"""What slime logs of a rollout. ``Sample`` has of slime's samples what log_rollout reads."""

from dataclasses import dataclass, field

import pytest

from er_sglang.integrations.slime import log_rollout


@dataclass
class SpecInfo:
    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0


@dataclass
class Sample:
    spec_info: SpecInfo = field(default_factory=SpecInfo)


def logged(*infos):
    metrics = {"other": 1}
    assert log_rollout(0, None, [Sample(SpecInfo(*info)) for info in infos], metrics, 1.0) is False, (
        "slime logs the rest"
    )
    assert metrics.pop("other") == 1
    return {name.removeprefix("rollout/self_quant_"): value for name, value in metrics.items()}


def test_pooled_over_samples():
    """A long sample in cycles of 3, half of the drafts accepted; one decoded plainly, by which slime halves the
    rate."""
    metrics = logged((30, 60, 20, 51), (0, 0, 20, 21))
    assert metrics == {"accept_rate": 0.5, "gamma": 1.5, "tokens_per_step": 1.75}


def test_nothing_drafted():
    assert logged((0, 0, 20, 21)) == {"gamma": 0, "tokens_per_step": 1}


@pytest.mark.parametrize("samples", [[], [()]])
def test_nothing_decoded(samples):
    """No sample at all; or samples whose only token is the prefill's."""
    assert logged(*samples) == {}


def test_rollout_functions_of_the_old_style(caplog):
    with caplog.at_level("INFO"):
        assert log_rollout(7, None, [Sample(SpecInfo(30, 60, 20, 51))], None, 1.0) is False
    assert "rollout 7" in caplog.text and "'rollout/self_quant_accept_rate': 0.5" in caplog.text
