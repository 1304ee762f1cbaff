"""Servers without the imports: SGLang is imported once, and processes of servers are forked from there.

SGLang's imports take 16 s of a core, in each of a server's three processes: on two cores, most of what these tests would
take. A zygote imports, and does nothing else. A server forked from it is what `python -m sglang.launch_server` is after
its imports, in an environment and a session of its own. At its birth it forks standbys, children with nothing but
imports done, too; whatever it spawns becomes of them, by multiprocessing's own protocol: parents, arguments, environment,
and plugins that every process loads for itself are those of a server that users start.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib
import multiprocessing.util
import os
import runpy
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

# What every process of a server imports sooner or later.
IMPORTED = ("sglang.launch_server", "sglang.srt.entrypoints.http_server", "sglang.srt.models.registry")
STANDBYS = 3  # a detokenizer and two schedulers; what is spawned beyond them is started as ever
FREE_FD = 500  # descriptors from here on are nobody's


# -- in the tests ----------------------------------------------------------------------------------------------


class Zygote:
    """A process that has imported SGLang in ``env``; ends with this one."""

    def __init__(self, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], start_new_session=True)
        self._connection = Connection(ours.detach())
        self._lock = threading.Lock()  # tests start servers at once, too
        atexit.register(self._connection.close)

    def ask(self, *request):
        with self._lock:
            self._connection.send(request)
            return self._connection.recv()


class Forked:
    """`command`, of `python -m module`, in a process forked from a zygote, as subprocess.Popen has it."""

    def __init__(self, zygote: Zygote, command: Sequence[str], env: Mapping[str, str], log_path: Path) -> None:
        python, flag, module, *words = command
        assert (python, flag) == (sys.executable, "-m")
        self._zygote = zygote
        self.pid: int = zygote.ask("start", module, words, dict(env), str(log_path))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._status(os.WNOHANG)

    def wait(self) -> int:
        return self._status(0)

    def _status(self, options: int) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ask("status", self.pid, options)
        return self.returncode


# -- in the zygote, and in what is forked from it --------------------------------------------------------------


def main(descriptor: int) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    serve(Connection(descriptor))


def serve(connection: Connection) -> None:
    """Answer the tests until they end. A forked process comes from here, too, and is then a server."""
    while True:
        try:
            kind, *request = connection.recv()
        except EOFError:
            return
        if kind == "start":
            if not os.fork():
                os.setsid()
                connection.send(os.getpid())
                connection.close()
                return become_server(*request)
        else:
            pid, options = request
            done, status = os.waitpid(pid, options)
            connection.send(os.waitstatus_to_exitcode(status) if done else None)


def become_server(module: str, words: Sequence[str], env: dict[str, str], log_path: str) -> None:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(env)
    added = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*added, *(path for path in sys.path if path not in added)]
    importlib.invalidate_caches()
    standbys: list[socket.socket] = []
    for _ in range(STANDBYS):
        ours, theirs = socket.socketpair()
        if not os.fork():
            for each in (ours, *standbys):
                each.close()
            return become_spawned(theirs)
        theirs.close()
        standbys.append(ours)
    spawn_from(standbys)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def spawn_from(standbys: list[socket.socket]) -> None:
    """multiprocessing's processes become of these, as long as there are any."""
    start = multiprocessing.util.spawnv_passfds

    def spawnv_passfds(path, args, passfds):
        if "--multiprocessing-fork" not in args or not standbys:
            return start(path, args, passfds)
        program = args[args.index("-c") + 1]
        with Connection(standbys.pop().detach()) as connection:
            connection.send((program, dict(os.environ), list(map(int, passfds))))
            with socket.socket(fileno=os.dup(connection.fileno())) as channel:
                socket.send_fds(channel, [b"fds"], list(map(int, passfds)))
            return connection.recv()

    multiprocessing.util.spawnv_passfds = spawnv_passfds


def become_spawned(channel: socket.socket) -> None:
    """What `python -c program --multiprocessing-fork` is after its imports, with descriptors at the parent's numbers."""
    with Connection(channel.detach()) as connection:
        try:
            program, env, numbers = connection.recv()
        except EOFError:  # the server has ended
            return
        with socket.socket(fileno=os.dup(connection.fileno())) as channel:
            _, received, _, _ = socket.recv_fds(channel, 3, len(numbers))
        connection.send(os.getpid())
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, FREE_FD) for each in received]
    for each in received:
        os.close(each)
    for each, number in zip(high, numbers):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-c", "--multiprocessing-fork"]
    exec(program, {"__name__": "__main__"})


if __name__ == "__main__":
    main(int(sys.argv[1]))
