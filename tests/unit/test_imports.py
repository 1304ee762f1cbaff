"""Imports go one way: decision code knows neither torch nor SGLang, and only named modules know SGLang."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "er_sglang"

PURE = (
    "config control errors host metrics policy.acceptance policy.config policy.decide policy.paper policy.profile policy.tables "
    "quantize.blocks refusals tools.simulate tools.workload trace updates"
).split()
KNOWS_SGLANG = {
    *("algorithm autoload chain drafter hooks logprobs relay steering verifier worker".split()),
    *("calibration.fingerprint calibration.measure quantize.marlin quantize.scaled_mm quantize.hopper".split()),
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


@pytest.mark.parametrize("name", PURE)
def test_decision_code_is_pure(name):
    assert not needs(name, FOUND) & {"torch", "sglang", "sgl_kernel", "triton", "transformers"}


@pytest.mark.parametrize("name", sorted(FOUND))
def test_only_named_modules_know_sglang(name):
    direct = {other.partition(".")[0] for other in FOUND[name]} & {"sglang", "sgl_kernel"}
    assert bool(direct) == (name in KNOWS_SGLANG)


def test_every_named_module_exists():
    assert {*PURE, *KNOWS_SGLANG} <= set(FOUND)
