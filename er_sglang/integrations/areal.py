"""AReaL: rollout servers with SELF_QUANT, run by an SGLang of their own. ``launch/areal`` has the rest.

AReaL 1.0.4 pins SGLang 0.5.10, which has neither plugins nor a registry of speculative algorithms. Its client speaks to
a newer SGLang without change, so all that is replaced is the command that starts a server. In the training script:

    from er_sglang.integrations.areal import use_self_quant
    use_self_quant()        # before the trainer is made

The rollout workers read ER_SGLANG_PYTHON, the Python of an environment with ``er_sglang[sglang]``; the servers inherit
ER_SGLANG_CONFIG. Give both in ``rollout.scheduling_spec``. Serves AReaL's single controller (v1), which starts the
servers itself; its older launchers and its controller v2 have commands of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from areal.api.cli_args import InferenceEngineConfig, get_py_cmd
from areal.engine.sglang_remote import RemoteSGLangEngine, SGLangBackend
from areal.infra import RemoteInfEngine

PYTHON_ENV = "ER_SGLANG_PYTHON"


class SelfQuantBackend(SGLangBackend):
    """AReaL's client of SGLang, which starts ``sglang.launch_server`` instead of AReaL's copy of it."""

    def launch_server(self, server_args: dict[str, Any]) -> subprocess.Popen:
        if (python := os.environ.get(PYTHON_ENV)) is None:
            raise RuntimeError(
                f"{PYTHON_ENV} is not set: name the Python of an environment with er_sglang[sglang] in "
                "rollout.scheduling_spec[0].env_vars."
            )
        command = get_py_cmd("sglang.launch_server", {**server_args, "speculative_algorithm": "SELF_QUANT"})
        # AReaL puts the whole path of its own Python, site-packages included, into its workers' PYTHONPATH.
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.Popen([python, *command[1:]], env=env, stdout=sys.stdout, stderr=sys.stdout)


class SelfQuantEngine(RemoteSGLangEngine):
    """AReaL's rollout engine with that client; AReaL's workers import it by its name."""

    def __init__(self, config: InferenceEngineConfig) -> None:
        self.config = config
        self._engine = RemoteInfEngine(config, SelfQuantBackend())


def use_self_quant() -> None:
    """Make AReaL's trainers start their SGLang rollout servers with SELF_QUANT."""
    from areal.trainer import rl_trainer  # all of the trainer: not for the workers, which import this module too

    rl_trainer.RemoteSGLangEngine = SelfQuantEngine
