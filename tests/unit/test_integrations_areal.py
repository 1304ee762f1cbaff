"""The server command that AReaL's workers run. AReaL is stood in for by the few names we take from it, so this says
nothing of AReaL itself."""

import importlib
import json
import sys
from types import ModuleType

import pytest

RECORDER = """#!{python}
import json, os, sys
json.dump([sys.argv[1:], os.environ.get("PYTHONPATH"), os.environ.get("ER_SGLANG_CONFIG")], open({file!r}, "w"))
"""


class Backend:
    """AReaL's SGLangBackend."""


class Engine:
    """AReaL's RemoteSGLangEngine and RemoteInfEngine."""

    def __init__(self, config, backend=None):
        self.config, self.backend = config, backend


def get_py_cmd(module, args):
    words = [word for name, value in args.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["python3", "-m", module, *words]


@pytest.fixture
def integration(monkeypatch):
    names = {
        "areal": {},
        "areal.api": {},
        "areal.api.cli_args": {"InferenceEngineConfig": object, "get_py_cmd": get_py_cmd},
        "areal.engine": {},
        "areal.engine.sglang_remote": {"RemoteSGLangEngine": Engine, "SGLangBackend": Backend},
        "areal.infra": {"RemoteInfEngine": Engine},
        "areal.trainer": {},
        "areal.trainer.rl_trainer": {"RemoteSGLangEngine": Engine},
    }
    for name, members in names.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.delitem(sys.modules, "er_sglang.integrations.areal", raising=False)
    yield importlib.import_module("er_sglang.integrations.areal")
    del sys.modules["er_sglang.integrations.areal"]


def test_server_command(integration, monkeypatch, tmp_path):
    """AReaL's flags and ours, by the Python of the servers, which must not find AReaL's packages."""
    python, record = tmp_path / "python", tmp_path / "record.json"
    python.write_text(RECORDER.format(python=sys.executable, file=str(record)))
    python.chmod(0o755)
    for name, value in {"ER_SGLANG_PYTHON": str(python), "ER_SGLANG_CONFIG": "c.json", "PYTHONPATH": "/areal"}.items():
        monkeypatch.setenv(name, value)
    server = integration.SelfQuantBackend().launch_server({"model_path": "policy", "tp_size": 2})
    assert server.wait(timeout=600) == 0
    flags = ["--model-path", "policy", "--tp-size", "2", "--speculative-algorithm", "SELF_QUANT"]
    assert json.loads(record.read_text()) == [["-m", "sglang.launch_server", *flags], None, "c.json"]


def test_no_python_named(integration, monkeypatch):
    monkeypatch.delenv("ER_SGLANG_PYTHON", raising=False)
    with pytest.raises(RuntimeError, match="ER_SGLANG_PYTHON is not set"):
        integration.SelfQuantBackend().launch_server({})


def test_the_trainer_uses_our_engine(integration):
    integration.use_self_quant()
    engine = sys.modules["areal.trainer.rl_trainer"].RemoteSGLangEngine
    assert engine is integration.SelfQuantEngine
    # AReaL's workers import the engine by module and name.
    assert f"{engine.__module__}.{engine.__name__}" == "er_sglang.integrations.areal.SelfQuantEngine"
    assert isinstance(engine("config")._engine.backend, integration.SelfQuantBackend)
