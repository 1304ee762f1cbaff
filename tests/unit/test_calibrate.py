"""`er-sglang calibrate` measures now, whatever was measured before; the server is a stand-in."""

from pathlib import Path

import pytest

from er_sglang.cli import main
from er_sglang.config import CACHE_ENV, cache_folder
from er_sglang.tools import serving


@pytest.fixture
def calibrate(tmp_path, monkeypatch, capsys):
    """Runs the command; servers measure 1, 2, 3, ... and say what they were asked for by `state`."""
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    measurements = iter("123")
    state = {"mode": "auto", "gammas": [1, 2]}

    class StandIn:
        def __init__(self, *_, env={}, **__):
            self._cache = cache_folder({CACHE_ENV: str(tmp_path / "cache"), **env})

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def self_quant(self):
            profile = self._cache / "profiles/digest.json"
            if not profile.exists():
                profile.parent.mkdir(parents=True)
                profile.write_text(next(measurements))
            return {"profile": str(profile), **state}

    monkeypatch.setattr(serving, "Server", StandIn)

    def calibrate(**more):
        state.update(more)
        return main(["calibrate", "--model-path", "policy", "--out", str(tmp_path / "out.json")])

    return calibrate


def test_every_run_measures_and_keeps(calibrate, tmp_path):
    for measured in "12":
        assert calibrate() == 0
        assert (tmp_path / "out.json").read_text() == (tmp_path / "cache/profiles/digest.json").read_text() == measured


@pytest.mark.parametrize(
    ("profile", "words"), [(None, "without step times"), ("/elsewhere/14b.json", 'leave "profile" out')]
)
def test_a_server_that_measures_nothing(calibrate, tmp_path, capsys, profile, words):
    assert calibrate(profile=profile) == 1
    assert words in capsys.readouterr().err and not Path(tmp_path / "out.json").exists()
