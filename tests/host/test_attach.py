"""SELF_QUANT is known where it should be, in processes of every kind, and nowhere else."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.host.oracle import Oracle
from tests.host.servers import ENV, START_TIMEOUT_S

# What a trainer's actor does: nobody has loaded SGLang's plugins in this process.
BARE = """
import multiprocessing, sys
def construct(where):
    from sglang.srt.server_args import ServerArgs
    args = ServerArgs(model_path=sys.argv[1], device="cpu", attention_backend="torch_native", skip_tokenizer_init=True,
                      speculative_algorithm="SELF_QUANT", speculative_num_steps=3)
    print(where, args.speculative_algorithm, args.speculative_num_draft_tokens, flush=True)
if __name__ == "__main__":
    construct("parent")
    child = multiprocessing.get_context("spawn").Process(target=construct, args=("child",))
    child.start()
    child.join()
"""
BOTH_KNOW = "parent SELF_QUANT 4\nchild SELF_QUANT 4\n"

ENGINE = """
import os, sglang, sys
if __name__ == "__main__":
    os.environ["ER_SGLANG_CONFIG"] = '{"policy": {"mode": "always"}}'
    engine = sglang.Engine(model_path=sys.argv[1], device="cpu", attention_backend="torch_native", dtype="float32",
                           sampling_backend="pytorch", grammar_backend="none", skip_tokenizer_init=True,
                           disable_overlap_schedule=True, max_total_tokens=4096,
                           speculative_algorithm="SELF_QUANT", speculative_num_steps=3)
    greedy = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    print("OUTPUT", engine.generate(input_ids=[5, 6, 7], sampling_params=greedy)["output_ids"])
    print("CYCLES", engine.get_server_info()["internal_states"][0]["self_quant"]["cycles"])
    engine.shutdown()
"""


def run(script: str, folder: Path, policy: Path, python=sys.executable, path: Path | None = None):
    file = folder / "script.py"
    file.write_text(script)
    env = {**os.environ, **ENV, "PYTHONPATH": str(path or "")}
    return subprocess.run(
        [python, str(file), str(policy)], env=env, cwd=folder, capture_output=True, text=True, timeout=START_TIMEOUT_S
    )


def cli(*words, python=sys.executable):
    subprocess.run([python, "-m", "er_sglang.cli", *map(str, words)], check=True, timeout=START_TIMEOUT_S)


@pytest.fixture
def tree(tmp_path):
    """A copy of SGLang that a test may change."""
    source = Path(importlib.util.find_spec("sglang").origin).parent
    shutil.copytree(source, tmp_path / "tree/sglang")
    return tmp_path / "tree"


def test_engine(tmp_path, qwen3):
    done = run(ENGINE, tmp_path, qwen3)
    assert f"OUTPUT {Oracle(qwen3).greedy([5, 6, 7], 16)}" in done.stdout, done.stderr[-3000:]
    assert "CYCLES 0" not in done.stdout and "CYCLES" in done.stdout


def test_bare_server_args_on_stock_sglang(tmp_path, qwen3):
    done = run(BARE, tmp_path, qwen3)
    assert "Unknown speculative algorithm name: SELF_QUANT" in done.stderr


def test_bare_server_args_on_patched_sglang(tmp_path, tree, qwen3):
    cli("patch", "apply", "--root", tree)
    done = run(BARE, tmp_path, qwen3, path=tree)
    assert done.stdout == BOTH_KNOW, done.stderr[-3000:]


def test_bare_server_args_with_autoload(tmp_path, qwen3):
    """In an environment of its own that sees this one's packages: `.pth` files work per environment."""
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv/bin/python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = tmp_path / "venv/lib" / version / "site-packages"
    packages.joinpath("parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    cli("autoload", "on", python=python)
    done = run(BARE, tmp_path, qwen3, python=python)
    assert done.stdout == BOTH_KNOW, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("file", "text", "changed", "message"),
    [
        (
            "srt/managers/scheduler.py",
            "self, future_indices: torch.Tensor, batch",
            "self, indices: torch.Tensor, batch",
            "Scheduler._relay_forward_payload takes (self, indices",
        ),
        (
            "srt/speculative/dflash_info.py",
            "class DFlashVerifyInput",
            "class RenamedVerifyInput",
            "sglang.srt.speculative.dflash_info.DFlashVerifyInput is missing",
        ),
    ],
    ids=["signature", "name"],
)
def test_changed_sglang(tmp_path, tree, qwen3, file, text, changed, message):
    """A seam with another signature, a name that we import gone: whoever asks for SELF_QUANT is told which one."""
    source = (tree / "sglang" / file).read_text()
    assert text in source
    (tree / "sglang" / file).write_text(source.replace(text, changed))
    script = "from sglang.srt.plugins import load_plugins\nload_plugins()\n" + BARE
    done = run(script, tmp_path, qwen3, path=tree)
    assert "UnsupportedHost: SGLang 0.5.15.post1 was changed where SELF_QUANT attaches" in done.stderr
    assert message in done.stderr
