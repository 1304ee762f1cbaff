"""Policies and servers that several modules share. A server takes half a minute to start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.host.oracle import Oracle
from tests.host.policies import make_policy
from tests.host.servers import BULK, SABOTAGE, self_quant

torch.set_num_threads(1)  # tiny matrices; and the servers need the cores


def pytest_addoption(parser) -> None:
    parser.addoption("--minutes", type=float, default=3.0, help="how long to soak (tests/host/test_soak.py)")
    parser.addoption("--seed", type=int, help="what to ask in the soak; by default another one each time")


@pytest.fixture(scope="package", autouse=True)
def _compiled_triton():
    """The unit tests interpret Triton's kernels; a server that inherits that is not the one users run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def qwen3(folder):
    # About half of its drafts are rejected, at every position: a wrong rule shows.
    return make_policy(folder, "qwen3", spread=0.7)


@pytest.fixture(scope="session")
def qwen3_oracle(qwen3):
    return Oracle(qwen3)


@pytest.fixture(scope="session")
def switching(qwen3, folder):
    """gamma changes at every step, between 0 and 7."""
    config = {"policy": {"mode": "cycle", "cycle": [3, 1, 7, 0, 2, 7]}}
    args = {"enable-custom-logit-processor": True}
    with self_quant(qwen3, folder / "switching.log", config, 7, args, plugins=[BULK]) as server:
        yield server


class Saboteur:
    """A server that misbehaves by a rule of ``sabotage/er_sabotage.py``; gamma = 3 in every step."""

    def __init__(self, server, rule_file: Path) -> None:
        self.server = server
        self._rule_file = rule_file

    def obey(self, rule: str) -> None:
        self._rule_file.write_text(rule)


@pytest.fixture(scope="session")
def saboteur(qwen3, folder):
    rule_file = folder / "sabotage.txt"
    rule_file.write_text("none")
    env, log = {"ER_SABOTAGE_FILE": str(rule_file)}, folder / "sabotage.log"
    with self_quant(qwen3, log, {"policy": {"mode": "always"}}, 3, env=env, plugins=[SABOTAGE, BULK]) as server:
        yield Saboteur(server, rule_file)
