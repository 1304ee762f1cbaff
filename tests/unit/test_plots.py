"""What the plots show: the best gamma of a cell, the bins of a trace; and that the commands write pictures."""

import json
import re

import pytest

from er_sglang.cli import main
from er_sglang.errors import ConfigError
from er_sglang.policy.profile import Profile, Sample
from er_sglang.tools.plots import best_gamma, binned, read_trace

GAMMAS = (1, 3)


@pytest.fixture
def profile():
    """A token costs 1 ms to compute beyond the 10th; reading the weights takes 10 ms, the drafter's 3 ms."""
    rows = []
    for b in (1, 4, 16, 64):
        for c in (256, 4096):
            rows.append(Sample("draft", 0, b, c, 3e-3))
            for g in (0, *GAMMAS):
                rows.append(Sample("verify" if g else "target", g, b, c, 1e-3 * max(10, b * (g + 1))))
    rows = [row for row in rows if (row.batch, row.context_tokens) != (64, 4096)]
    return Profile.from_samples(rows, {"device": "H200"})


def test_best_gamma(profile):
    assert best_gamma(profile, 1, 256, [0.9] * 3)[0] == 3
    assert best_gamma(profile, 64, 256, [0.9] * 3)[0] == 0
    gamma, speedup = best_gamma(profile, 1, 256, [0.5] * 3)
    assert gamma == 1 and speedup == pytest.approx(1.5 * 10 / 13)


STEPS = [
    {"time_s": 100.0, "batch": 8, "gamma": 0, "accepted": 0},
    {"time_s": 101.0, "batch": 8, "gamma": 0, "accepted": 0},
    {"time_s": 103.0, "batch": 4, "gamma": 3, "accepted": 6},
    {"time_s": 104.0, "batch": 2, "gamma": 1, "accepted": 2},
]


def test_bins():
    first, last = binned(STEPS, 2)
    assert (first.time_s, first.batch, first.gamma, first.accept_length) == (1.0, 8.0, 0.0, None)
    assert (last.batch, last.gamma) == (3.0, 2.0)
    assert last.accept_length == pytest.approx(1 + 8 / 6)
    # The third step's ten tokens took from 101 to 103; how long the first step took is not known.
    assert (first.tokens_per_s, last.tokens_per_s) == ((8 + 5) / 2, (5 + 4) / 2)
    for count in (1, 3, 4, 50):
        width_s = 4.0 / count
        assert sum(each.tokens_per_s for each in binned(STEPS, count)) * width_s == pytest.approx(8 + 10 + 4)


@pytest.mark.parametrize("text", ["", '{"time_s": 1}\n{"ended": "trace_max_mb: 256 MB"}\n'])
def test_a_trace_without_steps_is_refused(tmp_path, text):
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="nothing to plot"):
        read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("plot timeline no.jsonl", "No such file"),
        ("plot timeline empty.jsonl", "nothing to plot"),
        ("plot timeline table.csv", "is not a trace"),
        ("plot crossover no.json", "No such file"),
        ("plot crossover empty.jsonl", "is not JSON"),
        ("plot crossover table.csv", "line 2: invalid literal"),
        ("simulate --profile 14b.json --fixed-gamma 2", r"\[2\].*calibrate"),
        ("simulate --profile 14b.json --modes on", "choose one of auto"),
        ("simulate --profile 14b.json --lengths fixed", "write fixed:N"),
        ("simulate --profile 14b.json --alpha 1.5", "from 0 to 1"),
    ],
)
def test_what_a_user_can_mend_is_a_line_and_not_a_traceback(words, named, profile, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    profile.save("14b.json")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "table.csv").write_text("phase,gamma,batch,context_tokens,seconds\ntarget,0,one,256,0.01\n")
    assert main(words.split()) == 1
    assert re.match(f"er-sglang: .*{named}", capsys.readouterr().err.splitlines()[-1])


def test_commands(profile, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    profile.save(tmp_path / "14b.json")
    assert main(["plot", "crossover", str(tmp_path / "14b.json"), "--out", str(tmp_path / "map.png")]) == 0
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, STEPS)))
    assert main(["plot", "timeline", str(tmp_path / "trace.jsonl"), "--out", str(tmp_path / "time.png")]) == 0
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("map.png", "time.png"))
