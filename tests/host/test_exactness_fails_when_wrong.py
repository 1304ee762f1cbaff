"""Failure first: each wrong rule, in the same server by the same requests, fails the tests of test_exactness.py."""

from itertools import product

import pytest

from tests.host.goodness import cells, is_exact
from tests.host.test_exactness import PENALTIES, PROMPT, SAMPLES, SETTINGS, sample

# The residual shows at rejections alone, and least where the filters leave a flat distribution: it takes so many samples
# to be found out whatever is drawn.
MORE_SAMPLES = {"residual-not-subtracted": 4 * SAMPLES}


def looks_exact(saboteur, oracle, rule, sampling) -> bool:
    saboteur.obey(rule)
    try:
        outputs = sample(saboteur.server, sampling, MORE_SAMPLES.get(rule, SAMPLES))
    finally:
        saboteur.obey("none")
    try:
        return is_exact(cells(oracle, PROMPT, outputs, sampling))
    except AssertionError:  # a token outside the support
        return False


@pytest.mark.parametrize("name", SETTINGS)
def test_right_rule_passes(saboteur, qwen3_oracle, name):
    assert looks_exact(saboteur, qwen3_oracle, "none", SETTINGS[name])


@pytest.mark.parametrize(
    "rule, name",
    [
        *product(["accept-always", "q-of-another-step"], SETTINGS),
        *product(["residual-not-subtracted"], ["T=1", "top_k+top_p+min_p", "logit_bias"]),
    ],
)
def test_wrong_rule_fails(saboteur, qwen3_oracle, rule, name):
    assert not looks_exact(saboteur, qwen3_oracle, rule, SETTINGS[name])


@pytest.mark.parametrize(
    "rule, name", [*(("penalties-ignored", name) for name in PENALTIES), ("penalties-late", "reward")]
)
def test_wrong_penalties_fail(saboteur, qwen3_oracle, rule, name):
    assert not looks_exact(saboteur, qwen3_oracle, rule, PENALTIES[name])
