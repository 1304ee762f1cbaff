"""Which requests are not drafted for, and what the others lose by them."""

from types import SimpleNamespace

import pytest

from er_sglang.host.riders import batch_blocker, riders
from er_sglang.policy.config import PolicyConfig
from er_sglang.policy.decide import Controller, State
from er_sglang.policy.profile import Rung
from er_sglang.steering.metrics import Launched, Metrics
from tests.profiles import flat_profile


def batch(*reqs, **info) -> SimpleNamespace:
    return SimpleNamespace(
        reqs=reqs,
        has_grammar=any(req.grammar for req in reqs),
        return_hidden_states=info.pop("return_hidden_states", False),
        sampling_info=SimpleNamespace(**{"has_custom_logit_processor": False, **info}),
    )


def request(grammar=None, processor=None) -> SimpleNamespace:
    return SimpleNamespace(grammar=grammar, custom_logit_processor=processor)


def test_requests_with_a_grammar_or_a_processor_ride():
    assert riders(batch(request(), request())) == {}
    mixed = batch(request(), request("json"), request(processor="ban"), has_custom_logit_processor=True)
    assert riders(mixed) == {1: "grammar", 2: "custom-logit-processor"}


@pytest.mark.parametrize("hidden_states, reason", [(False, None), (True, "hidden-states")])
def test_batches_that_refuse_say_why(hidden_states, reason):
    assert batch_blocker(batch(request(), return_hidden_states=hidden_states)) == reason


def test_riders_take_their_share_of_the_gain():
    controller = Controller(PolicyConfig(ladder=(3,), patience=0.0), flat_profile(1.0, 0.3, 1.2, gammas=(3,)))
    for _ in range(50):
        controller.observe([3] * 8, Rung(3))
    expected = {0: 4 / 2.1, 4: (1 + 0.5 * 3) / 2.1, 7: (1 + 3 / 8) / 2.1}
    for riding, speedup in expected.items():
        decision = controller.decide(State(batch=8, mean_context_tokens=1000.0, riding=riding))
        assert (decision.gamma > 0) == (speedup > 1.01)
        if decision.gamma:
            assert decision.expected_speedup == pytest.approx(speedup, rel=0.05)


def test_riders_are_counted_apart():
    metrics = Metrics(gamma_max=3)
    step = Launched(rung=Rung(3), reason="pays", batch=3, context_tokens=9.0, riding={1: "grammar"})
    refused = Launched(rung=Rung(0), reason="hidden-states", batch=2, context_tokens=9.0, refused=True)
    metrics.finished(step, [3, 0, 1], 0.01)
    metrics.finished(refused, [0, 0], 0.01)
    counts = metrics.snapshot()
    assert counts["riding_tokens"] == {"grammar": 1} and counts["refused_tokens"] == {"hidden-states": 2}
    assert (counts["drafted_tokens"], counts["accepted_tokens"], counts["emitted_tokens"]) == (6, 4, 9)
    assert counts["accept_length"] == 3.0
