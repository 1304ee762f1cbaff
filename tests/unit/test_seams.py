"""Which SGLang is taken for a release we know, and unchanged."""

import importlib.metadata
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from er_sglang.host import releases, seams
from tests.unit.test_imports import FOUND

needs_sglang = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="reads SGLang's sources")


@pytest.fixture
def check(monkeypatch):
    """check_version() as if SGLang were there in this version."""

    def check(version):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        seams.check_version()

    return check


@pytest.mark.parametrize("release", releases.RELEASES)
@pytest.mark.parametrize("build", ["", "+cu129", "+g1a2b3c4.d20260821"])
def test_release_and_its_local_builds(check, release, build):
    check(release + build)


@pytest.mark.parametrize(
    "version",
    ["0.5.15", "0.5.15.post2", "0.5.15.post10", "0.5.15.post2.dev3+g1a2b3c4", "0.5.15.post1.dev0", "0.0.0.dev0", "9.9"],
)
def test_other_versions_that_differ(check, changed, version):
    """The user is told how. A development version is some commit after the release: its user may know better."""
    changed()
    with pytest.raises(seams.UnsupportedHost, match="is not supported, and differs") as refused:
        check(version)
    assert "module sglang.srt.managers.schedule_batch is missing" in str(refused.value)
    assert "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SGLANG=0.5.15.post1" in str(refused.value)


def test_another_version_in_which_nothing_differs(check, monkeypatch, caplog):
    """Served, with a warning, if it is asked for by name, and refused with that remedy else."""
    monkeypatch.setattr(seams, "_compare", lambda seam: None)
    with pytest.raises(seams.UnsupportedHost, match="set ER_SGLANG_UNTESTED_RELEASE=0.9.0"):
        check("0.9.0")
    monkeypatch.setenv(seams.UNTESTED_ENV, "0.8.0")
    with pytest.raises(seams.UnsupportedHost, match="set ER_SGLANG_UNTESTED_RELEASE=0.9.0"):
        check("0.9.0")
    monkeypatch.setenv(seams.UNTESTED_ENV, "0.9.0")
    check("0.9.0")
    assert "on which it was never tested" in caplog.text


@needs_sglang
def test_installed_release_is_unchanged():
    seams.check_host()


def test_every_import_from_sglang_is_a_seam():
    imports = {name for names in FOUND.values() for name in names if name.partition(".")[0] == "sglang"}
    names = set(seams.imported_names(Path(seams.__file__).parents[1].rglob("*.py")))
    assert len(names) > 40
    assert imports == {module for module, _ in names} | {f"{module}.{name}" for module, name in names}


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A release in which only the modules given are there."""
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    caches = (seams.check_host, seams._names, seams._code)

    def changed(**modules):
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)

    for cached in caches:
        cached.cache_clear()
    yield changed
    for cached in caches:
        cached.cache_clear()


@needs_sglang
def test_a_release_without_what_we_take_is_refused(changed):
    changed()
    with pytest.raises(seams.UnsupportedHost, match="was changed where SELF_QUANT attaches") as refused:
        seams.check_host()
    for missing in ("distributed.get_tp_group is missing", "module sglang.srt.managers.schedule_batch is missing"):
        assert missing in str(refused.value)


def test_modules_are_named_from_srt_on_or_by_their_whole_name():
    assert seams._seam("layers.linear:function first") == seams.Seam("sglang.srt.layers.linear", "function", ("first",))
    assert seams._seam("sglang.kernels:Class.method") == seams.Seam("sglang.kernels", "Class.method", ())


def test_names_that_a_module_defines(changed):
    changed(
        first="import os\nif os:\n    def function(): unseen = 1\nclass Class: attribute = 1\nCONSTANT: int = 1\n",
        second="from sglang.first import *\nfrom sglang.first import Class as Renamed",
    )
    names = ("function", "Class", "CONSTANT", "Renamed", "attribute", "unseen", "first", "missing")
    assert [seams._defines("sglang.first", name) for name in names] == [True, True, True, *[False] * 5]
    assert [seams._defines("sglang.second", name) for name in names] == [True, True, True, True, *[False] * 4]
    assert seams._defines("sglang", "first") and not seams._defines("sglang.third", "function")


@pytest.mark.parametrize(
    ("name", "parameters", "problem"),
    [
        ("function", "first second", None),
        ("function", "first keyword", "takes (first, second, keyword), expected (first, keyword, ...)"),
        ("Class.method", "self", None),
        ("Class.method", "self first", "takes (self), expected (self, first, ...)"),
        ("Class.other", "self", "sglang.module.Class.other is missing"),
    ],
)
def test_signatures(changed, name, parameters, problem):
    changed(
        module="def function(first, /, second=1, *rest, keyword): third = 1\nclass Class:\n    def method(self): 1\n"
    )
    found = seams._compare(seams.Seam("sglang.module", name, tuple(parameters.split())))
    assert found is None if problem is None else problem in found
