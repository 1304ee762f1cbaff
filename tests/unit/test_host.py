"""Which versions of SGLang are taken for a release we know."""

import importlib.metadata

import pytest

from er_sglang.host import seams as host


@pytest.fixture
def check(monkeypatch):
    """check_host() as if SGLang were there in this version, with all its seams."""

    def check(version):
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        host.check_host()

    monkeypatch.setattr(host, "SEAMS", ())
    return check


@pytest.mark.parametrize("version", ["0.5.15.post1", "0.5.15.post1+cu129", "0.5.15.post1+g1a2b3c4.d20260821"])
def test_release_and_its_local_builds(check, version):
    check(version)


@pytest.mark.parametrize(
    "version",
    ["0.5.15", "0.5.15.post2", "0.5.15.post10", "0.5.15.post2.dev3+g1a2b3c4", "0.5.15.post1.dev0", "0.0.0.dev0"],
)
def test_other_versions(check, version):
    """A development version is some commit after the release: not refused for good, if its user knows better."""
    with pytest.raises(host.UnsupportedHost, match="is not supported") as refused:
        check(version)
    assert "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SGLANG=0.5.15.post1" in str(refused.value)
