"""What differs between SGLang's releases, a drift a module: the only place that knows it.

    settings = adapter("settings")

`settings.py` is for the newest release and those since the last drift, `settings_until_0_5_17.py` for releases up to
that one and after the drift before. All modules of a drift define the same names, with what they rely upon in the
release as ``SEAMS`` (see host/seams.py).

To drop the oldest release, delete the modules whose names end with it and its entry here. To add a release, rename what
drifted after the last one before, and write it anew without a suffix.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

RELEASES = ("0.5.15.post1", "0.5.17", "0.5.19", "0.5.20", "0.5.21", "0.5.23")
# pip installs it where nothing else is asked for: what we tested longest.
DEFAULT_RELEASE = RELEASES[0]
# The others were run on CPU alone.
RUN_ON_GPU = ("0.5.15.post1", "0.5.17")


def adapter(drift: str) -> ModuleType:
    """The module of a drift for the SGLang that is installed."""
    return importlib.import_module(f"{__name__}.{chosen(installed_version())[drift]}")


def installed_version() -> str:
    """Raises importlib.metadata.PackageNotFoundError if there is no SGLang."""
    return importlib.metadata.version("sglang")


@cache
def chosen(version: str) -> dict[str, str]:
    """The module of each drift for a version of SGLang, released or not."""
    modules: dict[str, str] = {}
    # From the newest to the oldest, so that the oldest that still holds for the version wins.
    for until, drift, name in sorted(_modules(), reverse=True):
        if until >= order(version):
            modules[drift] = name
    return modules


def _modules() -> Iterator[tuple[tuple[int, ...], str, str]]:
    """(the last release that it is for, drift, name) of every module."""
    for file in Path(__file__).parent.glob("[a-z]*.py"):
        drift, _, until = file.stem.partition("_until_")
        yield order(until) if until else _NEWEST, drift, file.stem


def order(version: str) -> tuple[int, ...]:
    """Sorts versions, as SGLang or a module's name writes them: 0.5.15 < 0.5.15.post1 = 0_5_15_post1 < 0.5.16.

    What is behind the release's own number, such as ".dev3" or "+cu129", does not count.
    """
    numbers = re.match(r"(\d+)[._](\d+)(?:[._](\d+))?(?:[._]post(\d+))?", version).groups(default="-1")
    return tuple(map(int, numbers))


_NEWEST = (10**9,)
