"""Start a real SGLang server as a child process, and stop it.

with Server("/path/to/policy", {"speculative-algorithm": "SELF_QUANT"}, log_path="server.log") as server:
    server.generate({"text": "041:", "sampling_params": {"max_new_tokens": 64}})
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.error import HTTPError, URLError

import torch
from tqdm import tqdm

from er_sglang.host.releases import adapter
from er_sglang.steering.control import as_name

ON_CPU = not torch.cuda.is_available()
LOG_TAIL_LINES = 40
HEALTH_POLL_S = 0.25
PORTS = range(20000, 32000)
START_ATTEMPTS = 3
LOST_PORT = "address already in use"

# A plain PC has neither the CUDA kernels nor Intel's AMX: ask for the parts of SGLang written in PyTorch.
# The host's memory is not a KV budget; a small fixed pool starts at once. Models that one serves this way are tiny,
# one thread is as fast, and several collapse when another process wants a core.
CPU_ENV = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
CPU_ARGS = {
    "device": "cpu",
    "attention-backend": "torch_native",
    "sampling-backend": "pytorch",
    "grammar-backend": "none",
    "disable-overlap-schedule": True,
    "max-total-tokens": 16384,
    "dtype": "float32",
}

Args = Mapping[str, object]


def server_command(model_path: str | Path, port: int, args: Args, extra_words: Sequence[str] = ()) -> list[str]:
    """The command line of one server.

    `args` maps flag names without dashes to values: True is a bare flag, False or None leaves the flag
    out, a list is several words. `extra_words` come last, so they win.
    """
    command = [sys.executable, "-m", "sglang.launch_server"]
    for name, value in {"model-path": model_path, "host": "127.0.0.1", "port": port, **args}.items():
        if value is None or value is False:
            continue
        command.append(f"--{name}")
        if value is not True:
            command.extend(map(str, value) if isinstance(value, list | tuple) else [str(value)])
    return [*command, *extra_words]


def free_port() -> int:
    """A free port from PORTS: below the system's ephemeral ports, and port + 10000 (gRPC) is still a port."""
    while True:
        with socket.socket() as probe:
            port = random.choice(PORTS)
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


def exit_on_sigterm() -> None:
    """End this program, and with it its servers, when it is asked to terminate; they would outlive it otherwise."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


class Server:
    """A running `sglang.launch_server`; a context manager that ends the process group it started.

    On a machine without CUDA the flags of CPU_ARGS are added; `args` and `env` win over them.
    Raises RuntimeError with the end of the log if the server dies or is not healthy in `start_timeout_s`. A server that
    lost a port to another process, between choosing it and listening, is started again.
    """

    def __init__(
        self,
        model_path: str | Path,
        args: Args = {},
        *,
        extra_words: Sequence[str] = (),
        env: Mapping[str, str] = {},
        log_path: str | Path,
        start_timeout_s: float = 600.0,
    ):
        self.log_path = Path(log_path)
        self._model_path = model_path
        self._args = {**(CPU_ARGS if ON_CPU else {}), **args}
        self._extra_words = extra_words
        self.env = {**os.environ, **(CPU_ENV if ON_CPU else {}), **env}
        if ON_CPU:
            paths = [*adapter("cpu_kernels").PATHS, *filter(None, [self.env.get("PYTHONPATH")])]
            self.env["PYTHONPATH"] = os.pathsep.join(paths)
        # SGLang imports for 20 s from source and for 8 s from cached bytecode, twice at every start.
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.start_timeout_s = start_timeout_s

    def __enter__(self) -> "Server":
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        started_s = time.perf_counter()
        for attempt in range(1, START_ATTEMPTS + 1):
            self._start()
            try:
                self._wait_until_healthy()
                break
            except BaseException as error:
                self._stop()
                lost_port = isinstance(error, RuntimeError) and LOST_PORT in self._log().lower()
                if not lost_port or attempt == START_ATTEMPTS:
                    raise
        self.start_s = time.perf_counter() - started_s
        return self

    def __exit__(self, *exc_info) -> None:
        self._stop()

    def generate(self, payload: dict) -> dict | list[dict]:
        """POST /generate and return its JSON."""
        return self._request("/generate", payload)

    def get_server_info(self) -> dict:
        """GET /server_info: arguments, KV capacity, `internal_states`."""
        return self._request("/server_info")

    def self_quant(self) -> dict:
        """SELF_QUANT's entry in /server_info. Raises KeyError if the server runs without it."""
        return self.get_server_info()["internal_states"][0]["self_quant"]

    def change_self_quant(self, settings: dict) -> None:
        """Change SELF_QUANT's policy, now. Raises RuntimeError with the reason if the server refuses."""
        if not all(self._request("/set_internal_state", {"server_args": {as_name(settings): 1}})):
            raise RuntimeError(f"the server refused {settings}: {self.self_quant()['refused_change']}")

    def flush_cache(self) -> None:
        """Empty the radix cache; the server must be idle."""
        self._request("/flush_cache", {})

    def start_profile(self, folder: Path, *, steps: int, activities: list[str]) -> None:
        """Profile the next `steps` steps into `folder`; returns when their trace is written. Keep the server busy."""
        self._request("/start_profile", {"output_dir": str(folder), "num_steps": steps, "activities": activities})

    def log_tail(self) -> str:
        return "\n".join(self._log().splitlines()[-LOG_TAIL_LINES:])

    def _log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _request(self, path: str, payload: dict | None = None, timeout_s: float = 600.0):
        request = urllib.request.Request(self.base_url + path, headers={"Content-Type": "application/json"})
        if payload is not None:
            request.data = json.dumps(payload).encode()
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                body = response.read()
        except HTTPError as error:
            raise RuntimeError(f"{path} answered {error.code}: {error.read().decode(errors='replace')}") from error
        return json.loads(body) if body.startswith((b"{", b"[")) else body.decode()

    def _start(self) -> None:
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        command = server_command(self._model_path, self.port, self._args, self._extra_words)
        self.process = self._launch(command)

    def _launch(self, command: list[str]) -> subprocess.Popen:
        """Start a process that leads a session of its own and writes the log."""
        with open(self.log_path, "wb") as log:
            return subprocess.Popen(command, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _wait_until_healthy(self) -> None:
        deadline_s = time.perf_counter() + self.start_timeout_s
        with tqdm(desc="starting the server", bar_format="{desc} {elapsed}", mininterval=1.0, leave=False) as bar:
            while True:
                bar.update()
                if self.process.poll() is not None:
                    raise RuntimeError(
                        f"the server stopped with exit code {self.process.returncode}; end of "
                        f"{self.log_path}:\n{self.log_tail()}"
                    )
                if time.perf_counter() > deadline_s:
                    raise RuntimeError(
                        f"the server was not healthy after {self.start_timeout_s:.0f} s; end of "
                        f"{self.log_path}:\n{self.log_tail()}"
                    )
                try:
                    with urllib.request.urlopen(self.base_url + "/health", timeout=30):
                        return
                except (URLError, ConnectionError, TimeoutError):  # not listening yet, or 503 while loading
                    time.sleep(HEALTH_POLL_S)

    def _stop(self) -> None:
        # SGLang answers SIGTERM by draining for 5 s, and ends its own children by SIGKILL: do so at once.
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
