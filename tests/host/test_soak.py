"""Whatever is asked of a server, in whatever order: every request is answered, by the policy, and nothing leaks.

    pytest tests/host/test_soak.py --minutes 60 --seed 7

A soak fails by chance once in 1 / (2 FALSE_ALARM) runs.
"""

import time

import pytest

from tests.host.conftest import Saboteur
from tests.host.policies import VOCAB, make_policy
from tests.host.servers import SABOTAGE, TRAINER, TWO_RANKS, self_quant
from tests.host.soak import TOKENIZER, Soak
from tests.host.trainer_client import TrainerClient

ARGS = {
    "skip-tokenizer-init": False,
    "grammar-backend": "outlines",  # xgrammar refuses the CPU
    "enable-custom-logit-processor": True,
    "enable-return-hidden-states": True,
    # So few that requests wait, and are retracted.
    "max-running-requests": 8,
    "max-total-tokens": 500,
    "schedule-conservativeness": 0.01,
    "chunked-prefill-size": 32,
}
SERVERS = {
    "overlap": {"disable-overlap-schedule": False},
    "no overlap": {"page-size": 4},
    "two ranks": {"disable-overlap-schedule": False, "tp-size": 2},
}
LONG_MINUTES = 10


@pytest.fixture(scope="module")
def policies(folder):
    assert len(TOKENIZER) == VOCAB
    paths = [make_policy(folder / "soak", "qwen3", seed=seed, spread=0.7) for seed in (41, 42)]
    for path in paths:
        TOKENIZER.save_pretrained(path)
    return paths


def serve(policies, folder, name, env={}):
    # Drafts read less than all of a context of more than 80 tokens.
    drafter = {"attention_window": 16, "window_by": "recency" if name == "no overlap" else "attention"}
    config = {"policy": {"mode": "cycle", "cycle": [3, 0, 1, 2, 3]}, "drafter": drafter}
    env = {**(TWO_RANKS if name == "two ranks" else {}), **env}
    args, log = {**ARGS, **SERVERS.get(name, {})}, folder / f"soak {name}.log"
    return self_quant(policies[0], log, config, 3, args, env, [TRAINER, SABOTAGE])


@pytest.mark.parametrize("name", SERVERS)
def test_soak(policies, folder, name, request):
    minutes, seed = request.config.getoption("minutes"), request.config.getoption("seed")
    if name == "two ranks" and minutes < LONG_MINUTES:
        pytest.skip(f"in soaks of {LONG_MINUTES} minutes or more")
    if seed is None:  # a short soak is a test, which asks the same every time; a long one searches
        seed = int(time.time()) if minutes >= LONG_MINUTES else 1
    with serve(policies, folder, name) as server:
        ranks = 2 if name == "two ranks" else 1
        soak = Soak(server, policies, seed, ranks=ranks)
        soak.run(60 * minutes / (3 if minutes >= LONG_MINUTES else 2))
    print(f"\nseed {seed}: {dict(soak.seen)}")
    assert all(soak.seen[kind] for kind in ("answered", "aborted", "left", "retracted", "completions", "_update"))


@pytest.fixture(scope="module")
def saboteur(policies, folder):
    rule_file = folder / "soak sabotage.txt"
    rule_file.write_text("none")
    with serve(policies, folder, "sabotage", {"ER_SABOTAGE_FILE": str(rule_file)}) as server:
        yield Saboteur(server, rule_file)


# By which of its rules is chance: the one whose request ends first.
@pytest.mark.parametrize("sabotage", ["token-repeated", "updates-ignored", "requests-lost", "slots-leaked"])
def test_a_soak_fails_when(saboteur, policies, sabotage):
    TrainerClient(saboteur.server).send_disk(policies[0])
    soak = Soak(saboteur.server, policies, seed=1, timeout_s=20.0)
    saboteur.obey(sabotage)
    try:
        with pytest.raises(AssertionError, match="seed 1"):
            soak.run(60)
    finally:
        saboteur.obey("none")
