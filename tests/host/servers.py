"""Real servers for the tests: SGLang on CPU, with SELF_QUANT or without."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from er_sglang.config import CONFIG_ENV
from er_sglang.tools.serving import CPU_ARGS, CPU_ENV, Server
from tests.host.zygote import Forked, Zygote

# For what hangs: on a busy machine a start takes minutes, and a server that dies is noticed at once.
START_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 240.0

ARGS = {
    **CPU_ARGS,
    "skip-tokenizer-init": True,
    "random-seed": 20240607,
    "max-running-requests": 2048,
    "max-total-tokens": 80_000,
    # An idle scheduler polls in a loop; several of them would starve the one under test.
    "sleep-on-idle": True,
}
ENV = {
    **CPU_ENV,
    "CUDA_VISIBLE_DEVICES": "",  # float32 on CPU everywhere: outputs are compared token by token
    "TORCHDYNAMO_DISABLE": "1",  # SGLang compiles its repetition penalty, for half a minute
}
# SGLang plugins, for tests only: what each does, its module says.
PLUGINS = Path(__file__).parent
BULK, SABOTAGE = PLUGINS / "bulk_plugin", PLUGINS / "sabotage"
TRAINER, TWINS = PLUGINS / "trainer_plugin", PLUGINS / "twins_plugin"
CORES = sorted(os.sched_getaffinity(0))
# For a server with tp-size 2.
TWO_RANKS = {
    "SGLANG_CPU_OMP_THREADS_BIND": f"{CORES[0]}|{CORES[-1]}",  # else one rank per NUMA node
    "SGLANG_NCCL_SO_PATH": "/none",  # SGLang tries NCCL wherever it finds the library, on CPU too
}


class HostServer(Server):
    """A server whose requests time out, so that a test that hangs fails."""

    def _request(self, path: str, payload: dict | None = None, timeout_s: float = REQUEST_TIMEOUT_S):
        return super()._request(path, payload, timeout_s)

    def post(self, path: str, payload: dict):
        return self._request(path, payload)

    def set_internal_state(self, server_args: dict) -> bool:
        """What SGLang answers: whether the change was made."""
        (updated,) = self.post("/set_internal_state", {"server_args": server_args})
        return updated

    def metrics(self) -> str:
        return self._request("/metrics")

    def stream(self, payload: dict, path: str = "/generate", timeout_s: float = REQUEST_TIMEOUT_S) -> Iterator[dict]:
        """POST with ``stream``; its chunks, as they come."""
        request = urllib.request.Request(
            f"{self.base_url}{path}",
            json.dumps({**payload, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[len(b"data: ") :])

    def empty(self) -> None:
        """Wait until no request is left and empty the radix cache. An idle SGLang stops if KV slots have leaked."""
        self._request(f"/flush_cache?timeout={REQUEST_TIMEOUT_S}", {})


class ForkedServer(HostServer):
    def _launch(self, command: list[str]) -> Forked:
        return Forked(zygote(), command, self.env, self.log_path)


@cache
def zygote() -> Zygote:
    """Of the servers of this process."""
    return Zygote(Server("", {}, env=ENV, log_path="").env)


def plain(policy: Path, log_path: Path, args: Mapping[str, object] = {}) -> HostServer:
    """Stock SGLang: the entry point is installed, but no algorithm is asked for."""
    return ForkedServer(policy, {**ARGS, **args}, env=ENV, log_path=log_path, start_timeout_s=START_TIMEOUT_S)


def self_quant(
    policy: Path,
    log_path: Path,
    config: Mapping[str, object],
    gamma_max: int,
    args: Mapping[str, object] = {},
    env: Mapping[str, str] = {},
    plugins: Sequence[Path] = (),
) -> HostServer:
    """``config``: SELF_QUANT's settings, as the user writes them in JSON. ``plugins``: folders of SGLang plugins."""
    path = os.pathsep.join([*map(str, plugins), *filter(None, [os.environ.get("PYTHONPATH")])])
    return ForkedServer(
        policy,
        {**ARGS, "speculative-algorithm": "SELF_QUANT", "speculative-num-steps": gamma_max, **args},
        env={**ENV, "PYTHONPATH": path, CONFIG_ENV: json.dumps({"max_draft_batch": 2048, **config}), **env},
        log_path=log_path,
        start_timeout_s=START_TIMEOUT_S,
    )


def greedy(new_tokens: int, **more) -> dict:
    """Sampling parameters of a greedy request that ends after ``new_tokens``."""
    return {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True, **more}


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]
