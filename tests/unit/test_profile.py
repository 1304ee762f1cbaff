"""The measured table: interpolation, repair, unavailable cells, files and fingerprints."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from er_sglang.policy.profile import PLAIN, Profile, ProfileError, Rung, Sample
from er_sglang.policy.tables import complete, isotonic

BATCHES, CONTEXTS = (1, 4, 16), (512, 1024, 4096)


def plane(batch: float, context: float, gamma: int) -> float:
    """Bilinear in batch and context, so that interpolation is exact."""
    return 1e-3 * (5 + gamma + 0.1 * batch * (gamma + 1)) + 1e-8 * batch * context


def assert_monotone(table) -> None:
    for line in (*table, *zip(*table)):
        assert all(a <= b * (1 + 1e-6) for a, b in zip(line, line[1:]))


def samples(batches=BATCHES, contexts=CONTEXTS, gammas=(1, 3)) -> list[Sample]:
    rows = []
    for b in batches:
        for c in contexts:
            rows.append(Sample("target", 0, b, c, plane(b, c, 0)))
            rows.append(Sample("draft", 0, b, c, plane(b, c, 0) / 2))
            rows += [Sample("verify", gamma, b, c, plane(b, c, gamma)) for gamma in gammas]
    return rows


@given(batch=st.floats(1, 16), context=st.floats(512, 4096))
def test_interpolation_is_bilinear(batch, context):
    costs = Profile.from_samples(samples()).costs(batch, context)
    assert not costs.outside
    assert costs.step_s[PLAIN] == pytest.approx(plane(batch, context, 0))
    for gamma in (1, 3):
        expected = gamma * plane(batch, context, 0) / 2 + plane(batch, context, gamma)
        assert costs.step_s[Rung(gamma)] == pytest.approx(expected)


def test_single_tables_agree_with_costs():
    profile = Profile.from_samples(samples())
    costs = profile.costs(7, 2000)
    assert profile.gammas == (1, 3)
    assert profile.target_s(7, 2000) == costs.step_s[PLAIN]
    assert 3 * profile.drafted_token_s(7, 2000) + profile.verify_s(7, 2000, 3) == costs.step_s[Rung(3)]
    windowed = profile.with_attention_window(256, sink_tokens=64)
    for rung, seconds in windowed.costs(7, 2000).step_s.items():
        assert windowed.step_s(7, 2000, rung) == seconds


@pytest.mark.parametrize("context", [600, 800, 1024, 4096, 9000])
def test_a_window_bounds_what_drafts_read(context):
    profile = Profile.from_samples(samples())
    windowed = profile.with_attention_window(960, sink_tokens=64)
    assert windowed.drafted_token_s(4, context, 960) == pytest.approx(profile.drafted_token_s(4, min(context, 1024)))
    assert windowed.windows == (0, 960) and windowed.draft_s[0] == profile.draft_s[0]
    assert windowed.forward_s == profile.forward_s


@pytest.mark.parametrize(
    ("context", "seen"), [(600, 600), (700, 700), (900, 764), (1024, 764), (4096, 764), (9000, 764)]
)
def test_a_window_costs_what_it_sees_between_measured_contexts_and_beyond(context, seen):
    """Measured as a server measures: with 700 tokens besides the first 64, apart only where a context is longer."""
    windowed = [Sample("draft", 0, b, c, plane(b, 764, 0) / 2, 700) for b in BATCHES for c in CONTEXTS if c > 700]
    windowed += [Sample("draft", 0, b, 512, plane(b, 512, 0) / 2, 700) for b in BATCHES]
    profile = Profile.from_samples([*samples(), *windowed])
    assert profile.drafted_token_s(4, context, 700) == pytest.approx(plane(4, seen, 0) / 2)
    alone = Profile.from_samples([each for each in samples() if each.phase != "draft"] + windowed)
    assert alone.drafted_token_s(4, context, 700) == pytest.approx(
        plane(4, min(764, 512 + (context - 512) * 252 / 512), 0) / 2
    )


@pytest.mark.parametrize(("batch", "context"), [(32, 1024), (4, 9000), (4, 100)])
def test_outside_is_said(batch, context):
    assert Profile.from_samples(samples()).costs(batch, context).outside


def test_beyond_the_table_the_last_segment_goes_on_and_before_it_the_first_cell_holds():
    profile = Profile.from_samples(samples())
    assert profile.target_s(32, 1024) == pytest.approx(plane(32, 1024, 0))
    assert profile.target_s(4, 100) == profile.target_s(4, 512)


def test_repeated_samples_give_their_median():
    rows = samples() + [Sample("target", 0, 4, 1024, seconds) for seconds in (1.0, plane(4, 1024, 0))]
    assert Profile.from_samples(rows).target_s(4, 1024) == pytest.approx(plane(4, 1024, 0))


def test_repair_makes_time_grow_with_batch_and_context_and_reports_what_it_moved():
    rows = [
        r._replace(seconds=r.seconds * 1.5) if (r.phase, r.batch, r.context_tokens) == ("target", 4, 1024) else r
        for r in samples()
    ]
    profile = Profile.from_samples(rows)
    table = profile.forward_s[0]
    assert_monotone(table)
    assert any("target gamma 0 at batch 4, context 1024" in line for line in profile.outliers)
    assert not Profile.from_samples(samples()).outliers


@given(st.lists(st.floats(0.5, 2.0), min_size=9, max_size=9))
def test_repair_is_monotone_for_any_noise(noise):
    rows = [r._replace(seconds=r.seconds * noise[i // 4]) for i, r in enumerate(samples())]
    for table in Profile.from_samples(rows).forward_s.values():
        assert_monotone(table)


def test_a_cell_that_memory_forbids_is_marked_and_extrapolated():
    rows = [r for r in samples() if (r.phase, r.batch, r.context_tokens) != ("verify", 16, 4096)]
    profile = Profile.from_samples(rows)
    assert profile.unavailable == {(16, 4096)}
    assert profile.costs(16, 4096).outside and profile.costs(8, 2048).outside
    assert not profile.costs(4, 4096).outside and not profile.costs(16, 1024).outside
    assert profile.verify_s(16, 4096, 3) == pytest.approx(plane(16, 4096, 3))


def test_a_stair_is_not_taken_for_a_slope():
    """Graphs at 48, 96 and 128, and just above: at 97 a step takes as long as at 128."""
    stairs = {48: 10.0, 49: 20.0, 96: 20.0, 97: 27.0}
    cells = {(batch, 512): seconds for batch, seconds in stairs.items()}
    (*_, (extrapolated,)) = complete(cells, [*stairs, 128], [512])
    assert 27.0 < extrapolated < 40.0


def test_what_was_measured_in_an_unavailable_cell_is_used():
    rows = [r for r in samples() if (r.phase, r.batch, r.context_tokens) != ("verify", 16, 4096)]
    rows = [
        r._replace(seconds=1.0) if (r.phase, r.batch, r.context_tokens) == ("target", 16, 4096) else r for r in rows
    ]
    assert Profile.from_samples(rows).target_s(16, 4096) == 1.0


def test_too_little_to_extrapolate_from_is_refused():
    rows = [r for r in samples() if r.context_tokens != 4096 or r.batch == 1]
    with pytest.raises(ProfileError, match="at least two measured batch sizes"):
        Profile.from_samples(rows)


def test_a_missing_phase_is_named():
    with pytest.raises(ProfileError, match="draft"):
        Profile.from_samples([r for r in samples() if r.phase != "draft"])


@pytest.mark.parametrize(
    "row", [Sample("verify", 0, 1, 512, 1.0), Sample("target", 2, 1, 512, 1.0), Sample("warm", 0, 1, 512, 1.0)]
)
def test_a_sample_of_no_known_phase_is_refused(row):
    with pytest.raises(ProfileError, match="phase must be one of"):
        Profile.from_samples([*samples(), row])


def test_nonsense_seconds_are_refused():
    with pytest.raises(ProfileError, match="positive, finite"):
        Profile.from_samples([r._replace(seconds=0.0) for r in samples()])


def test_json_round_trip(tmp_path):
    fingerprint = {"gpu": "H200", "tp_size": 2, "graph_batches": (1, 2, 4)}
    rows = [r for r in samples() if (r.batch, r.context_tokens) != (16, 4096)]
    profile = Profile.from_samples([*rows, Sample("target", 0, 16, 4096, 1.0)], fingerprint)
    profile.save(tmp_path / "cache" / "profile.json")
    loaded = Profile.load(tmp_path / "cache" / "profile.json", expected=fingerprint)
    assert loaded.costs(9, 3000) == profile.costs(9, 3000)
    assert loaded.unavailable == profile.unavailable == {(16, 4096)}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["profile.json"]


def test_another_fingerprint_is_refused_by_name(tmp_path):
    path = tmp_path / "profile.json"
    Profile.from_samples(samples(), {"gpu": "H100", "model": "14B", "torch": "2.11"}).save(path)
    with pytest.raises(ProfileError) as refusal:
        Profile.load(path, expected={"gpu": "H200", "model": "14B", "tp_size": 1})
    message = str(refusal.value)
    assert "gpu: profile 'H100', here 'H200'" in message and "tp_size" in message and "torch" in message
    assert "model" not in message and "er-sglang calibrate" in message


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    Profile.from_samples(samples()).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 0}))
    with pytest.raises(ProfileError, match="calibrate again"):
        Profile.load(path)


SPOILT = {
    "no JSON": lambda content: "{",
    "no object": lambda content: [],
    "a missing key": lambda content: {key: content[key] for key in content if key != "draft_s"},
    "no drafted token": lambda content: {**content, "draft_s": {}},
    "a table of another type": lambda content: {**content, "forward_s": [1.0]},
    "a cell of another type": lambda content: {**content, "draft_s": {"0": [["fast"] * 3] * 3}},
    "an axis of another type": lambda content: {**content, "batches": 16},
    "a fingerprint of another type": lambda content: {**content, "fingerprint": "H200"},
    "a truncated table": lambda content: {**content, "draft_s": {"0": content["draft_s"]["0"][:-1]}},
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_profile_is_refused_with_its_path(tmp_path, spoil):
    path = tmp_path / "profile.json"
    Profile.from_samples(samples()).save(path)
    content = spoil(json.loads(path.read_text()))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ProfileError, match="calibrate again") as refusal:
        Profile.load(path, expected={})
    assert str(path) in str(refusal.value)


def test_csv(tmp_path):
    path = tmp_path / "table.csv"
    lines = [",".join(map(str, row[:5])) for row in samples()]
    path.write_text("\n".join(["phase,gamma,batch,context_tokens,seconds", *lines]))
    assert Profile.from_csv(path).costs(3, 700) == Profile.from_samples(samples()).costs(3, 700)
    windowed = [*samples(), *(row._replace(window=256) for row in samples() if row.phase == "draft")]
    path.write_text("\n".join([",".join(Sample._fields), *(",".join(map(str, row)) for row in windowed)]))
    assert Profile.from_csv(path).costs(3, 700) == Profile.from_samples(windowed).costs(3, 700)
    path.write_text("phase,batch\ntarget,1")
    with pytest.raises(ProfileError, match="lacks the columns context_tokens, gamma, seconds"):
        Profile.from_csv(path)


def test_one_wild_cell_does_not_lift_the_others():
    """Compilation once went into a sample, four hundred times a step, and its whole row was thought slow."""
    cells = {(batch, context): 0.005 for batch in range(1, 23) for context in (256, 1024)}
    repaired = isotonic({**cells, (1, 256): 2.0})
    assert max(repaired.values()) < 1.2 * 0.005
