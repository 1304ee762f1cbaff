"""How a server is started, with a stand-in for SGLang."""

import sys

import pytest

from er_sglang.tools import serving
from er_sglang.tools.serving import LOST_PORT, START_ATTEMPTS, Server

# Fails with a message as often as its file has letters, then answers 200 to everything.
STAND_IN = """
import http.server, pathlib, sys
port, failures, message = int(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
left = failures.read_text()
if left:
    failures.write_text(left[1:])
    sys.exit(message)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    failures = tmp_path / "failures"

    def server(count: int, message: str) -> Server:
        failures.write_text("x" * count)
        command = [sys.executable, "-c", STAND_IN]
        monkeypatch.setattr(
            serving, "server_command", lambda path, port, *_: [*command, str(port), str(failures), message]
        )
        return Server("policy", log_path=tmp_path / "log", start_timeout_s=600)

    return server


def test_a_start_that_lost_its_port_is_repeated(server):
    with server(START_ATTEMPTS - 1, f"[Errno 98] A{LOST_PORT[1:]}") as started:
        assert started.process.poll() is None


def test_not_for_ever(server):
    with pytest.raises(RuntimeError, match="exit code 1"), server(START_ATTEMPTS, LOST_PORT):
        pass


def test_another_failure_is_final(server):
    with pytest.raises(RuntimeError, match="out of memory"), server(1, "out of memory"):
        pass
