"""Autoload, in a virtual environment of its own with a stand-in for SGLang."""

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from er_sglang import autoload

REPOSITORY = Path(__file__).parents[2]

# The parts of SGLang that autoload touches. The one plugin registers SELF_QUANT unless PLUGIN_FAILS is set.
SGLANG = {
    "sglang/__init__.py": "",
    "sglang/srt/__init__.py": "",
    "sglang/srt/speculative/__init__.py": "",
    "sglang/srt/speculative/spec_registry.py": """
REGISTRY = {}
def get_spec(name):
    return REGISTRY.get(name.upper())
""",
    "sglang/srt/speculative/spec_info.py": """
from enum import Enum
from sglang.srt.speculative.spec_registry import get_spec
class SpeculativeAlgorithm(Enum):
    EAGLE = 1
    NONE = 2
    @classmethod
    def from_string(cls, name):
        if name is None:
            return cls.NONE
        if name in cls.__members__:
            return cls[name]
        if get_spec(name) is None:
            raise ValueError(f"Unknown speculative algorithm name: {name}")
        return get_spec(name)
""",
    "sglang/srt/plugins.py": """
import os
from sglang.srt.speculative.spec_registry import REGISTRY
loads = 0
def load_plugins():
    global loads
    loads += 1
    if "PLUGIN_FAILS" not in os.environ:
        REGISTRY["SELF_QUANT"] = "our algorithm"
""",
}
ER_SGLANG = {
    "er_sglang/__init__.py": "",
    "er_sglang/autoload.py": (REPOSITORY / "er_sglang/autoload.py").read_text(),
    "er_sglang/host/seams.py": """
import os
ALGORITHM = "SELF_QUANT"
def check_version():
    if "PLUGIN_FAILS" in os.environ:
        raise RuntimeError("SGLang 9.9 is not supported")
""",
}
ASK = "from sglang.srt.speculative.spec_info import SpeculativeAlgorithm as A; print(A.from_string({name!r}))"


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


class Environment:
    """A virtual environment with the two stand-ins; autoload is on."""

    def __init__(self, folder: Path):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin/python"
        major, minor = sys.version_info[:2]
        self.site_packages = folder / f"lib/python{major}.{minor}/site-packages"
        write(self.site_packages, SGLANG | ER_SGLANG | {autoload.PTH_NAME: autoload.PTH_LINE})

    def run(self, code: str, **environment: str) -> subprocess.CompletedProcess:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.python, "-c", code], env=clean | environment, cwd="/", capture_output=True, text=True, timeout=600
        )

    def ask(self, name: str | None, **environment: str) -> subprocess.CompletedProcess:
        return self.run(ASK.format(name=name), **environment)


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "environment")


def test_known_in_a_process_that_loaded_no_plugins(environment):
    for name in ("SELF_QUANT", "self_quant"):
        done = environment.ask(name)
        assert (done.returncode, done.stdout, done.stderr) == (0, "our algorithm\n", "")


def test_unknown_without_autoload(environment):
    (environment.site_packages / autoload.PTH_NAME).unlink()
    done = environment.ask("SELF_QUANT")
    assert done.returncode == 1 and "Unknown speculative algorithm name: SELF_QUANT" in done.stderr


def test_known_in_a_spawned_child(environment, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing\n"
        f"def child():\n    {ASK.format(name='SELF_QUANT')}\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=child)\n"
        "    process.start(); process.join(); raise SystemExit(process.exitcode)\n"
    )
    done = environment.run(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    assert done.stdout == "our algorithm\n", done.stderr


def test_loads_plugins_only_when_needed_and_once(environment):
    done = environment.run(
        "from sglang.srt.speculative.spec_info import SpeculativeAlgorithm as A\n"
        "from sglang.srt import plugins\n"
        "A.from_string(None); A.from_string('EAGLE'); print(plugins.loads)\n"
        "A.from_string('SELF_QUANT'); A.from_string('SELF_QUANT'); print(plugins.loads)\n"
    )
    assert done.stdout == "0\n1\n", done.stderr


def test_other_unknown_names_stay_unknown(environment):
    done = environment.ask("SELF_QUAINT")
    assert "Unknown speculative algorithm name: SELF_QUAINT" in done.stderr


def test_a_refusing_plugin_gives_its_reason_to_who_asks(environment):
    done = environment.ask("SELF_QUANT", PLUGIN_FAILS="1")
    assert done.returncode == 1 and "RuntimeError: SGLang 9.9 is not supported" in done.stderr
    done = environment.ask("EAGLE", PLUGIN_FAILS="1")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("er_sglang/host/seams.py", "import no_such_module", "No module named 'no_such_module'"),
        ("er_sglang/host/seams.py", "", "cannot import name 'ALGORITHM'"),
        ("sglang/srt/speculative/spec_info.py", "class SpeculativeAlgorithm: pass", "no attribute 'from_string'"),
    ],
)
def test_a_broken_er_sglang_warns_and_lets_sglang_work(environment, path, text, reason):
    (environment.site_packages / path).write_text(text)
    assert environment.run("print('up')").stderr == ""
    done = environment.run("import sglang.srt.speculative.spec_info; print('up')")
    assert done.stdout == "up\n"
    assert "RuntimeWarning: er_sglang cannot make SELF_QUANT available" in done.stderr and reason in done.stderr


def test_python_starts_with_a_broken_or_absent_package(environment):
    (environment.site_packages / "er_sglang/__init__.py").write_text("raise RuntimeError('broken')")
    done = environment.run("print('up')")
    assert done.stdout == "up\n" and "RuntimeError: broken" in done.stderr
    (environment.site_packages / "er_sglang").rename(environment.site_packages / "uninstalled")
    done = environment.run("print('up')")
    assert (done.stdout, done.stderr) == ("up\n", "")


# What `importlib.util` brings in, by Python version; most interpreters have it loaded before they reach their first
# line.
IMPORTLIB_NEEDS = (
    "importlib types warnings contextlib functools collections itertools keyword operator reprlib _collections "
    "_functools "
    "_operator abc _abc _collections_abc threading _weakrefset _weakref"
).split()


def test_start_up_imports_nothing_heavy(environment):
    """With the real er_sglang: whatever its `__init__` imports, every interpreter pays for."""
    (environment.site_packages / "er_sglang").rename(environment.site_packages / "stand_in")
    (environment.site_packages / "_er_sglang.pth").write_text(str(REPOSITORY) + "\n")
    listing = "import sys; print(*sorted(sys.modules))"
    loaded = set(environment.run(listing).stdout.split())
    (environment.site_packages / autoload.PTH_NAME).unlink()
    bare = set(environment.run(listing).stdout.split())
    extra = loaded - bare
    assert {name for name in extra if name.startswith("er_sglang")} == {"er_sglang", "er_sglang.autoload"}
    assert {name.partition(".")[0] for name in extra} <= {"er_sglang", *IMPORTLIB_NEEDS}


def er_sglang(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    autoload.add_command(parser.add_subparsers())
    args = parser.parse_args(["autoload", *argv])
    return args.run(args)


def test_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / autoload.PTH_NAME
    monkeypatch.setattr(autoload, "pth_path", lambda: path)
    for action, code, is_on in [
        ("status", 1, False),
        ("on", 0, True),
        ("on", 0, True),
        ("status", 0, True),
        ("off", 0, False),
        ("off", 0, False),
        ("status", 1, False),
    ]:
        assert (er_sglang(action), path.exists()) == (code, is_on)
        assert f"autoload is {'on' if is_on else 'off'}" in capsys.readouterr().out
    monkeypatch.setattr(autoload, "pth_path", lambda: tmp_path / "no such folder" / autoload.PTH_NAME)
    assert er_sglang("on") == 1
    assert "No such file" in capsys.readouterr().err


def test_line_goes_where_this_python_looks_for_it():
    import site

    assert str(autoload.pth_path().parent) in site.getsitepackages()
    assert autoload.PTH_LINE.startswith("import ") and autoload.PTH_LINE.count("\n") == 1
