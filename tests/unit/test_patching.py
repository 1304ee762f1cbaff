"""Patch script: on small synthetic trees, and on the installed SGLang's own file where there is one."""

import argparse
import importlib.metadata
import os
import stat
import sys
from pathlib import Path

import pytest

from er_sglang.tools import patching

RELEASE = "0.5.15.post1"
SPEC_INFO = "sglang/srt/speculative/spec_info.py"
SPEC_INFO_TEXT = """\
from sglang.srt.speculative.spec_registry import get_spec as _get_registered_spec


class SpeculativeAlgorithm(Enum):
    NONE = auto()

    @classmethod
    def from_string(cls, name):
        if name is None:
            return cls.NONE
        upper = name.upper()
        try:
            return cls[upper]
        except KeyError:
            pass
        spec = _get_registered_spec(upper)
        if spec is not None:
            return spec
        raise ValueError(f"Unknown speculative algorithm name: {name}")

    def is_none(self):
        return self == SpeculativeAlgorithm.NONE
"""


def er_sglang(*argv: str | Path) -> int:
    parser = argparse.ArgumentParser()
    patching.add_command(parser.add_subparsers())
    args = parser.parse_args([str(word) for word in ("patch", *argv)])
    return args.run(args)


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def make_tree(base: Path, release: str | None = RELEASE) -> Path:
    (base / SPEC_INFO).parent.mkdir(parents=True)
    (base / SPEC_INFO).write_text(SPEC_INFO_TEXT)
    (base / "sglang/__init__.py").touch()
    if release is not None:
        (base / "sglang/_version.py").write_text(f"__version__ = version = '{release}'\n")
    return base


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "site-packages")


# ---- the shipped series ----------------------------------------------------------------------------------------------


def test_apply_verify_revert(tree, capsys):
    before = snapshot(tree)
    assert er_sglang("verify", "--root", tree) == 1
    assert er_sglang("apply", "--root", tree) == 0
    assert er_sglang("verify", "--root", tree) == 0
    after = snapshot(tree)
    assert {path for path in before if before[path] != after[path]} == {SPEC_INFO}
    assert after.keys() == before.keys(), "temporary files were left behind"
    assert after[SPEC_INFO].count(b"load_plugins()") == 1
    compile(after[SPEC_INFO], SPEC_INFO, "exec")

    capsys.readouterr()
    assert er_sglang("apply", "--root", tree) == 0
    assert "already applied" in capsys.readouterr().out
    assert snapshot(tree) == after

    assert er_sglang("revert", "--root", tree) == 0
    assert snapshot(tree) == before
    assert er_sglang("revert", "--root", tree) == 0
    assert "nothing to revert" in capsys.readouterr().out
    assert snapshot(tree) == before


def test_every_patch_is_listed_and_in_the_ledger():
    ledger = (patching.patches_folder() / "README.md").read_text()
    for folder in patching.patches_folder().glob("sglang-*"):
        listed = (folder / "series").read_text().split()
        assert listed == sorted(path.name for path in folder.glob("*.patch"))
        for name in listed:
            assert name.removesuffix(".patch") in ledger
            assert patching.parse_patch(name, (folder / name).read_bytes()).hunks


def test_checkout_and_its_python_folder(tmp_path):
    make_tree(tmp_path / "sglang" / "python")
    assert er_sglang("apply", "--root", tmp_path / "sglang") == 0
    assert er_sglang("verify", "--root", tmp_path / "sglang" / "python") == 0


def test_default_root_is_the_importable_sglang(tree, monkeypatch):
    monkeypatch.delitem(sys.modules, "sglang", raising=False)  # another test's, which would be found first
    monkeypatch.syspath_prepend(tree)
    assert er_sglang("apply") == 0
    assert b"load_plugins" in (tree / SPEC_INFO).read_bytes()


def test_on_top_of_other_patches_in_the_same_file(tree):
    """A trainer's edits above and below the hunk: it moves, and revert leaves them."""
    path = tree / SPEC_INFO
    path.write_text("import slime_addition\n" * 30 + SPEC_INFO_TEXT.replace("is_none", "is_nothing"))
    before = snapshot(tree)
    assert er_sglang("apply", "--root", tree) == 0
    assert er_sglang("verify", "--root", tree) == 0
    assert er_sglang("revert", "--root", tree) == 0
    assert snapshot(tree) == before


def test_other_patches_on_top_of_ours(tree):
    assert er_sglang("apply", "--root", tree) == 0
    path = tree / SPEC_INFO
    path.write_text("import slime_addition\n" + path.read_text())
    assert er_sglang("verify", "--root", tree) == 0
    assert er_sglang("revert", "--root", tree) == 0
    assert path.read_text() == "import slime_addition\n" + SPEC_INFO_TEXT


@pytest.mark.parametrize("action", ["apply", "verify", "revert"])
@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("except KeyError:", "except LookupError:", "+         except LookupError:"),
        ("            pass\n", "", "-             pass"),
        (
            "        spec = _get_registered_spec(upper)\n",
            "        spec = find(upper)\n",
            "+         spec = find(upper)",
        ),
    ],
)
def test_drift_is_refused_with_file_hunk_and_lines(tree, capsys, action, before, after, reason):
    path = tree / SPEC_INFO
    assert before in SPEC_INFO_TEXT
    path.write_text(SPEC_INFO_TEXT.replace(before, after))
    drifted = snapshot(tree)
    assert er_sglang(action, "--root", tree) == 2
    message = capsys.readouterr().err
    assert f"{SPEC_INFO}: hunk 1 of 1 of 0001-" in message
    assert reason in message
    assert snapshot(tree) == drifted


@pytest.mark.parametrize("action", ["apply", "verify", "revert"])
def test_edited_after_applying_is_drift(tree, capsys, action):
    assert er_sglang("apply", "--root", tree) == 0
    path = tree / SPEC_INFO
    path.write_text(path.read_text().replace("            load_plugins()\n", ""))
    assert er_sglang(action, "--root", tree) == 2
    assert "does not fit" in capsys.readouterr().err


def test_two_places_that_fit_are_refused(tree, capsys):
    path = tree / SPEC_INFO
    path.write_text(SPEC_INFO_TEXT * 2)
    assert er_sglang("apply", "--root", tree) == 2
    assert "lines 14, 36" in capsys.readouterr().err
    assert path.read_text() == SPEC_INFO_TEXT * 2


def test_missing_file_is_drift(tree, capsys):
    (tree / SPEC_INFO).unlink()
    assert er_sglang("verify", "--root", tree) == 2
    assert "no such file" in capsys.readouterr().err


# ---- which release, which tree ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("release", ["0.5.10", "0.5.15", "0.5.15.post2.dev0"])
def test_unsupported_release_is_refused(tmp_path, capsys, release):
    tree = make_tree(tmp_path / "tree", release)
    assert er_sglang("apply", "--root", tree) == 2
    message = capsys.readouterr().err
    assert f"SGLang {release} " in message and RELEASE in message and "--release" in message
    assert er_sglang("apply", "--root", tree, "--release", RELEASE) == 0


def test_tree_without_a_version_needs_release(tmp_path, capsys):
    tree = make_tree(tmp_path / "tree", release=None)
    assert er_sglang("verify", "--root", tree) == 2
    assert "--release" in capsys.readouterr().err
    assert er_sglang("verify", "--root", tree, "--release", RELEASE) == 1


def test_local_version_counts_as_its_release(tmp_path):
    assert er_sglang("verify", "--root", make_tree(tmp_path / "tree", f"{RELEASE}+cu129")) == 1


def test_folder_without_sglang_is_refused(tmp_path, capsys):
    assert er_sglang("apply", "--root", tmp_path) == 2
    assert f"no SGLang in {tmp_path}" in capsys.readouterr().err


# ---- all or nothing --------------------------------------------------------------------------------------------------


def hunk(old: str, new: str) -> patching.Hunk:
    return patching.Hunk(
        old=tuple(old.encode().splitlines(keepends=True)), new=tuple(new.encode().splitlines(keepends=True))
    )


@pytest.fixture
def stack(tmp_path):
    """Two files and three patches: the first changes both files, the second builds on it, the third on neither."""
    (tmp_path / "a.py").write_text("one\ntwo\n")
    (tmp_path / "b.py").write_text("three\nfour\n")
    first = patching.Patch(name="1", hunks={"a.py": (hunk("one\n", "ONE\n"),), "b.py": (hunk("four\n", "FOUR\n"),)})
    second = patching.Patch(name="2", hunks={"b.py": (hunk("FOUR\n", "FIVE\n"),)})
    third = patching.Patch(name="3", hunks={"a.py": (hunk("two\n", "TWO\n"),)})
    return patching.Tree(base=tmp_path, release="test", patches=(first, second, third))


def texts(tree: patching.Tree) -> tuple[str, str]:
    return (tree.base / "a.py").read_text(), (tree.base / "b.py").read_text()


def test_series_is_a_stack(stack):
    assert patching.apply(stack) == 0
    assert texts(stack) == ("ONE\nTWO\n", "three\nFIVE\n")
    assert patching.verify(stack) == 0
    assert patching.revert(stack) == 0
    assert texts(stack) == ("one\ntwo\n", "three\nfour\n")


def test_tree_of_an_older_series_gets_what_it_lacks(stack, capsys):
    older = patching.Tree(base=stack.base, release="test", patches=stack.patches[:2])
    assert patching.apply(older) == 0
    assert patching.verify(stack) == 1
    assert "2 of 3 patches" in capsys.readouterr().out
    assert patching.apply(stack) == 0
    assert patching.verify(stack) == 0


def test_drift_in_the_last_file_leaves_the_first_alone(stack):
    (stack.base / "b.py").write_text("three\nvier\n")
    with pytest.raises(patching.Drift, match=r"b\.py: hunk 1 of 1 of 1"):
        patching.apply(stack)
    assert texts(stack) == ("one\ntwo\n", "three\nvier\n")


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2)])
def test_failed_write_puts_everything_back(stack, monkeypatch, failure, function, call):
    before = snapshot(stack.base)
    real, calls = getattr(os, function), []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == call:
            raise failure
        return real(*args)

    monkeypatch.setattr(os, function, fail_once)
    with pytest.raises(type(failure)):
        patching.apply(stack)
    assert len(calls) >= call, "the failure was never injected"
    assert snapshot(stack.base) == before


def test_write_error_is_reported_not_raised(tree, monkeypatch, capsys):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    assert er_sglang("apply", "--root", tree) == 2
    assert "disk full" in capsys.readouterr().err


def test_mode_hard_links_and_symbolic_links(tree, tmp_path):
    """A package manager's cache may share the file by hard link, a developer's tree by symbolic link."""
    path = tree / SPEC_INFO
    path.chmod(0o640)
    cached = tmp_path / "cache.py"
    os.link(path, cached)
    link = tmp_path / "linked"
    link.symlink_to(tree)
    assert er_sglang("apply", "--root", link) == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert cached.read_text() == SPEC_INFO_TEXT, "the cache was patched along with the tree"
    real = path.rename(tmp_path / "spec_info.py")
    path.symlink_to(real)
    assert er_sglang("revert", "--root", tree) == 0
    assert path.is_symlink() and real.read_text() == SPEC_INFO_TEXT


# ---- patch files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+x\n",
        "--- a/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-x\n",
        "--- a/old.py\n+++ b/new.py\n@@ -1 +1 @@\n-x\n+y\n",
        "--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-x\n+y\n\\ No newline at end of file\n",
        "--- a/x.py\n+++ b/x.py\n@@ -1,2 +1,2 @@\n-x\n+y\n",
    ],
    ids=["create", "delete", "rename", "no newline", "cut off"],
)
def test_patches_that_do_more_than_change_lines_are_refused(text):
    with pytest.raises(ValueError, match="p.patch: "):
        patching.parse_patch("p.patch", text.encode())


def test_bytes_survive():
    """Neither encodings nor line endings of untouched lines change."""
    content = b"\xff latin\r\none\n\x0c\nlast line without newline"
    done = patching.apply_in_memory({"x": content}, [patching.Patch(name="p", hunks={"x": (hunk("one\n", "two\n"),)})])
    assert done == {"x": content.replace(b"one", b"two")}


# ---- the real file ---------------------------------------------------------------------------------------------------


def test_installed_sglang(tmp_path):
    try:
        installed = importlib.metadata.distribution("sglang")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("SGLang is not installed")
    if installed.version != RELEASE:
        pytest.skip(f"SGLang {installed.version} is installed; the series is for {RELEASE}")
    for path in (SPEC_INFO, "sglang/__init__.py", "sglang/_version.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(Path(installed.locate_file(path)).read_bytes())
    if er_sglang("verify", "--root", tmp_path) == 0:  # whoever runs this may have patched the installed one
        assert er_sglang("revert", "--root", tmp_path) == 0
    before = snapshot(tmp_path)
    assert er_sglang("apply", "--root", tmp_path) == 0
    assert er_sglang("verify", "--root", tmp_path) == 0
    compile((tmp_path / SPEC_INFO).read_bytes(), SPEC_INFO, "exec")
    assert er_sglang("revert", "--root", tmp_path) == 0
    assert snapshot(tmp_path) == before
