"""Imports go one way: decision code knows neither torch nor SGLang, and only some rooms import SGLang."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "er_sglang"

# Rooms that know neither torch nor SGLang, whoever they import; `.` is the package's own folder.
PURE = {
    "policy": "*",
    "tools": "patching plots simulate simulator workload",
    "steering": "control metrics trace",
    "host": "seams refusals",
    "drafting": "updates",
    "quantize": "blocks",
    ".": "config errors",
}
# Rooms that may import SGLang.
HOSTED = {
    "host": "*",
    "host.releases": "*",
    "cycle": "*",
    "calibration": "*",
    "drafting": "attention drafter early fused linear policy_weight shadow twins",
    "steering": "steering",
    "quantize": "marlin scaled_mm",
    "bench": "attention sampling",
    ".": "worker autoload",
}


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function, but not for type checking alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def ours(name: str) -> set[str]:
    """Our own modules that a module imports."""
    return {inner for other in FOUND[name] if (inner := other.removeprefix("er_sglang.")) in FOUND}


def needs(name: str, found: dict[str, set[str]]) -> set[str]:
    """Top-level packages that a module imports, by way of our own modules too."""
    seen, open_names, packages = set(), [name], set()
    while open_names:
        current = open_names.pop()
        if current in seen:
            continue
        seen.add(current)
        for other in found[current]:
            inner = other.removeprefix("er_sglang.")
            if inner in found:
                open_names.append(inner)
            packages.add(other.partition(".")[0])
    return packages


FOUND = {name: imported(path) for name, path in modules().items()}


def within(name: str, rooms: dict[str, str]) -> bool:
    room, _, module = name.rpartition(".")
    named = rooms.get(room or ".", "")
    return named == "*" or module in named.split()


@pytest.mark.parametrize("name", [name for name in sorted(FOUND) if within(name, PURE)])
def test_pure_rooms(name):
    assert not needs(name, FOUND) & {"torch", "sglang", "sgl_kernel", "triton", "transformers"}


@pytest.mark.parametrize("name", sorted(FOUND))
def test_only_some_rooms_import_sglang(name):
    direct = {other.partition(".")[0] for other in FOUND[name]} & {"sglang", "sgl_kernel"}
    assert not direct or within(name, HOSTED)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_no_module_imports_itself_by_way_of_others(name):
    seen, open_names = set(), list(ours(name))
    while open_names:
        current = open_names.pop()
        if current not in seen:
            seen.add(current)
            open_names += ours(current)
    assert name not in seen


@pytest.mark.parametrize("name", [name for name in sorted(FOUND) if name.startswith("tools.")])
def test_tools_do_not_need_benchmarks(name):
    assert not any(other.startswith("bench") for other in ours(name))


LISTS = {
    file.parent: text
    for file in PACKAGE.rglob("__init__.py")
    if re.search(r"^\w+\.py  ", text := file.read_text(), re.M)
}


@pytest.mark.parametrize("room", LISTS, ids=lambda room: room.name)
def test_a_list_of_a_rooms_modules_is_whole(room):
    named = set(re.findall(r"\b\w+(?=\.py\b)", LISTS[room]))
    assert named == {file.stem for file in room.glob("*.py")} - {"__init__"}


def test_every_rule_is_about_something():
    rooms = {name.rpartition(".")[0] or "." for name in FOUND}
    named = {(room, module) for rules in (PURE, HOSTED) for room, names in rules.items() for module in names.split()}
    assert {room for room, _ in named} <= rooms
    assert all(module == "*" or (module if room == "." else f"{room}.{module}") in FOUND for room, module in named)
