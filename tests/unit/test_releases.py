"""Of the modules for one drift, the one for the release that is installed."""

import ast
from pathlib import Path

import pytest

from er_sglang.host import releases, seams

FILES = sorted(Path(releases.__file__).parent.glob("[a-z]*.py"))


def test_versions_are_ordered():
    versions = ["0.5.9", "0.5.15", "0.5.15.post1", "0.5.15.post2", "0.5.16", "0.5.17", "0.10.0", "1.0.0"]
    assert sorted(reversed(versions), key=releases.order) == versions
    assert releases.order("0_5_15_post1") == releases.order("0.5.15.post1") == releases.order("0.5.15.post1+cu129")


@pytest.fixture
def drifts(tmp_path, monkeypatch):
    for name in (
        "__init__",
        "updates",
        "updates_until_0_5_17",
        "updates_until_0_5_15_post1",
        "layers",
        "streams_until_0_5_17",
    ):
        (tmp_path / f"{name}.py").touch()
    monkeypatch.setattr(releases, "__file__", str(tmp_path / "__init__.py"))
    releases.chosen.cache_clear()
    yield
    releases.chosen.cache_clear()


@pytest.mark.parametrize(
    ("version", "updates"),
    [
        ("0.5.14", "updates_until_0_5_15_post1"),
        ("0.5.15.post1+cu129", "updates_until_0_5_15_post1"),
        ("0.5.15.post2", "updates_until_0_5_17"),
        ("0.5.17", "updates_until_0_5_17"),
        ("0.5.18", "updates"),
        ("9.9.9", "updates"),
    ],
)
def test_the_oldest_that_still_holds(drifts, version, updates):
    chosen = releases.chosen(version)
    assert chosen["updates"] == updates and chosen["layers"] == "layers"


def test_every_module_serves_a_supported_release():
    """What no release needs any more is deleted."""
    needed = {file for release in releases.RELEASES for file in seams._sources(release)}
    assert set(FILES) <= needed


def names(file):
    """What a module gives to those who ask for its drift."""
    tree = ast.parse(file.read_text())
    assigned = [target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    exported = next(
        (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), ()
    )
    return {name for name in {*assigned, *defined} if not name.startswith("_") and name != "SEAMS"} | (
        imported & set(exported)
    )


@pytest.mark.parametrize("drift", sorted({file.stem.partition("_until_")[0] for file in FILES}))
def test_all_modules_of_a_drift_define_the_same_names(drift):
    of_each = {file.stem: names(file) for file in FILES if file.stem.partition("_until_")[0] == drift}
    assert len({frozenset(found) for found in of_each.values()}) == 1, of_each
    assert of_each[drift]
