"""Hooks are bound where SELF_QUANT is served, all of them, and nowhere else."""

import json
import os
import subprocess
import sys

import pytest

from tests.host.servers import ENV, SABOTAGE, START_TIMEOUT_S, self_quant

# What the plugin imports into a process that has imported SGLang, and what it has put into SGLang's functions.
SCRIPT = """
import json, pkgutil, sys
import sglang.srt.managers.scheduler, sglang.srt.managers.tokenizer_manager, sglang.srt.speculative.eagle_utils
from sglang.srt.plugins import load_plugins, hook_registry
packages = lambda: {name.partition(".")[0] for name in sys.modules}
before = packages()
load_plugins()
foreign = sorted(packages() - before - sys.stdlib_module_names - {"er_sglang"})
from er_sglang.host import cpu, hooks, seams
from er_sglang.steering.control import KEY

def depth(target):
    function, wrappers = pkgutil.resolve_name(target), 0
    while function.__code__.co_filename == hook_registry.__file__:
        function, wrappers = function.__wrapped__, wrappers + 1
    return wrappers

tables = {"gate": hooks.GATE, "front end": hooks.FRONT_END_HOOKS, "scheduler": hooks.SCHEDULER_HOOKS,
          "cpu": cpu.CPU_HOOKS}
depths = lambda: {name: [depth(target) for target in table] for name, table in tables.items()}
plain = depths()
functions = [pkgutil.resolve_name(target) for table in tables.values() for target in table]
known = seams.written_seams(seams._sources(seams.check_version()))
signed = {f"{seam.module}.{seam.name}" for seam in known}
sglangs = {f"{function.__module__}.{function.__qualname__}" for function in functions}
unsigned = sorted(name for name in sglangs - signed if name.startswith("sglang."))
sources_checked = seams._code.cache_info().currsize > 0

class Manager:
    class server_args:
        speculative_algorithm = sys.argv[1]
hooks._bind_front_end(Manager)
front_end = depths()["front end"]

for _ in range(2):
    for table in tables.values():
        hooks.bind(table)
bound = depths()
reached = all(hooks._reaches(pkgutil.resolve_name(t), hook) for table in tables.values() for t, (_, hook) in table.items())

from sglang.srt.managers.scheduler import Scheduler
del Scheduler.on_idle
try:
    hooks.bind(hooks.SCHEDULER_HOOKS)
    error = None
except seams.UnsupportedHost as raised:
    error = str(raised)
print("RESULT" + json.dumps(dict(foreign=foreign, plain=plain, sources_checked=sources_checked, front_end=front_end,
                                 bound=bound, reached=reached, error=error, unsigned=unsigned)))
"""


def run(algorithm: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, algorithm],
        env={**os.environ, **ENV, "SGLANG_PLUGINS": "er_sglang"},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
    )
    assert "RESULT" in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.fixture(scope="module", params=["SELF_QUANT", "EAGLE"])
def found(request):
    return request.param, run(request.param)


def test_a_plain_process_runs_sglangs_own_functions(found):
    """Nothing but the gate is hooked, no source is read, and no package imported but ours."""
    _, result = found
    hooked = {name: max(depths) for name, depths in result["plain"].items()}
    assert hooked == {"gate": 1, "front end": 0, "scheduler": 0, "cpu": 0}
    assert not result["sources_checked"]
    assert not result["foreign"]


def test_a_front_end_is_hooked_for_a_self_quant_server_only(found):
    algorithm, result = found
    assert set(result["front_end"]) == {int(algorithm == "SELF_QUANT")}


def test_every_hook_is_bound_once(found):
    _, result = found
    assert {depth for depths in result["bound"].values() for depth in depths} == {1}
    assert result["reached"]


def test_the_signature_of_every_hooked_function_is_checked(found):
    _, result = found
    assert result["unsigned"] == []


def test_a_hook_that_does_not_fit_is_an_error(found):
    _, result = found
    assert "cannot hook sglang.srt.managers.scheduler.Scheduler.on_idle" in result["error"]


def test_a_server_one_of_whose_hooks_does_not_apply_does_not_start(qwen3, folder):
    """Here the one by which the drafter learns of an update."""
    env, log = {"ER_SABOTAGE_UNHOOKABLE": "update_weights_from_ipc"}, folder / "unhookable.log"
    server = self_quant(qwen3, log, {"policy": {"mode": "always"}}, 3, env=env, plugins=[SABOTAGE])
    with pytest.raises(RuntimeError, match="the server stopped with exit code"), server:
        pass
    log = server.log_path.read_text()
    assert "UnsupportedHost: SELF_QUANT cannot hook sglang" in log and "update_weights_from_ipc" in log
