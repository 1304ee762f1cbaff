"""The files in launch/slime, launch/verl and launch/areal say what we understand."""

import ast
import pkgutil
import re
import subprocess
from pathlib import Path

import pytest

from er_sglang.config import load_config

LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.mark.parametrize("trainer, gamma_max", [("slime", 7), ("verl", 7), ("areal", None)])
def test_settings(trainer, gamma_max):
    """slime and veRL give gamma_max by a flag, AReaL's servers have the default."""
    config = load_config(str(LAUNCH / trainer / "self_quant.json"), gamma_max, env={})
    assert config.gamma_max == 7


def test_slime_arguments():
    """One sourced line adds our arguments to those of the launch script, wherever it is run."""
    script = (
        f'set -eu; SGLANG_ARGS=(--before 1); source {LAUNCH}/slime/self_quant.sh; printf "%s\\n" "${{SGLANG_ARGS[@]}}"'
    )
    words = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True, cwd="/").stdout.split(
        "\n"
    )
    arguments = dict(zip(words[::2], words[1::2]))
    assert arguments["--before"] == "1"
    assert arguments["--sglang-speculative-algorithm"] == "SELF_QUANT"
    assert Path(arguments["--sglang-speculative-adaptive-config"]) == LAUNCH / "slime/self_quant.json"
    log_function, _, name = arguments["--custom-rollout-log-function-path"].rpartition(".")
    assert callable(pkgutil.resolve_name(f"{log_function}:{name}"))


@pytest.mark.parametrize("path", ["launch/slime/Dockerfile", "CONTRIBUTING.md"])
def test_lines_of_python(path):
    """Names that a shell line of a file imports from us exist: the image fails to build otherwise."""
    lines = re.findall(r'python -c "(.*?)"', (LAUNCH.parent / path).read_text())
    imports = [node for line in lines for node in ast.walk(ast.parse(line)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        for name in node.names:
            assert callable(pkgutil.resolve_name(f"{node.module}:{name.name}"))


def test_verl_overrides():
    """Hydra's words: the settings of speculation, and a field of SGLang's ServerArgs."""
    script = f'set -eu; source {LAUNCH}/verl/self_quant.sh; printf "%s\n" "${{SELF_QUANT[@]}}"'
    words = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True, cwd="/").stdout.split()
    mtp, config = (word.split("=") for word in words)
    assert mtp[0] == "actor_rollout_ref.rollout.mtp"
    settings = dict(setting.split(":") for setting in mtp[1].strip("{}").split(","))
    assert settings.pop("_target_") == "verl.workers.config.MtpConfig"
    assert settings == {
        "enable": "True",
        "enable_rollout": "True",
        "speculative_algorithm": "SELF_QUANT",
        "speculative_num_steps": "7",
        "speculative_eagle_topk": "1",
        "speculative_num_draft_tokens": "8",
    }
    assert config[0] == "++actor_rollout_ref.rollout.engine_kwargs.sglang.speculative_adaptive_config"
    assert Path(config[1]) == LAUNCH / "verl/self_quant.json"
