"""`er-sglang patch apply|verify|revert`: the series of patches for one SGLang release, on one tree.

    er-sglang patch apply --root /sgl-workspace/sglang

`patches/sglang-RELEASE/series` names the patches, in order; `patches/README.md` is the ledger. A series is a stack:
what is applied is its first n patches, so a tree patched by an older er_sglang gets only what it lacks.

A hunk must match the tree exactly, at one place; on which line does not matter, so other patches (a trainer's own)
may have changed the rest of the file. The whole series is worked out in memory first. New files are then written
beside the old ones and renamed over them; if anything fails on the way, the old ones are put back.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

APPLIED, NOT_APPLIED, REFUSED = 0, 1, 2  # exit codes

Files = dict[str, bytes]  # path below the folder that holds `sglang/` -> content


class PatchError(Exception):
    """Nothing was changed; the message says why and what to do."""


class Drift(PatchError):
    """The tree is neither as the release has it nor as the patches leave it."""


# ---- patches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Hunk:
    """Replace the lines `old` by the lines `new`, both with their context."""

    old: tuple[bytes, ...]
    new: tuple[bytes, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One unified diff: the hunks of each file it changes."""

    name: str
    hunks: Mapping[str, tuple[Hunk, ...]]

    def inverse(self) -> Patch:
        swapped = {
            path: tuple(Hunk(old=hunk.new, new=hunk.old) for hunk in hunks) for path, hunks in self.hunks.items()
        }
        return replace(self, hunks=swapped)


_HUNK_HEADER = re.compile(rb"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


def parse_patch(name: str, text: bytes) -> Patch:
    """Read a unified diff with `a/`, `b/` paths that changes existing files and does nothing else.

    Raises ValueError for a file created, deleted or renamed, for a missing newline at the end and for a cut-off hunk.
    """
    hunks: dict[str, list[Hunk]] = {}
    lines = iter(text.splitlines(keepends=True))
    for line in lines:
        if line.startswith(b"--- "):
            before, after = line[4:].strip(), next(lines, b"")[4:].strip()
            if before.partition(b"/")[2] != after.partition(b"/")[2]:
                raise ValueError(f"{name}: {before!r} -> {after!r}: only changes to existing files are supported")
            current = hunks.setdefault(after.partition(b"/")[2].decode(), [])
        elif header := _HUNK_HEADER.match(line):
            old_count, new_count = (int(count or 1) for count in header.groups())
            old: list[bytes] = []
            new: list[bytes] = []
            while len(old) < old_count or len(new) < new_count:
                body = next(lines, b"")
                if body[:1] not in (b" ", b"-", b"+"):
                    raise ValueError(f"{name}: hunk {line.strip()!r} is cut off at {body!r}")
                if body[:1] != b"+":
                    old.append(body[1:])
                if body[:1] != b"-":
                    new.append(body[1:])
            current.append(Hunk(old=tuple(old), new=tuple(new)))
        elif line.startswith(b"\\"):
            raise ValueError(f"{name}: files without a newline at their end are not supported")
    return Patch(name=name, hunks={path: tuple(found) for path, found in hunks.items()})


def apply_in_memory(files: Files, patches: Sequence[Patch]) -> Files:
    """The files with the patches applied in order. Raises Drift with the first hunk that does not fit."""
    files = dict(files)
    for patch in patches:
        for path, hunks in patch.hunks.items():
            lines = files[path].splitlines(keepends=True)
            for number, hunk in enumerate(hunks, start=1):
                begin = _locate(lines, hunk.old, f"{path}: hunk {number} of {len(hunks)} of {patch.name}")
                lines[begin : begin + len(hunk.old)] = hunk.new
            files[path] = b"".join(lines)
    return files


def applied_count(files: Files, patches: Sequence[Patch]) -> int:
    """How many patches, from the first one on, the files already carry: the most that can be taken back."""
    for count in range(len(patches), 0, -1):
        try:
            apply_in_memory(files, _inverse(patches[:count]))
        except Drift:
            continue
        return count
    return 0


def _inverse(patches: Sequence[Patch]) -> list[Patch]:
    return [patch.inverse() for patch in reversed(patches)]


def _locate(lines: list[bytes], block: tuple[bytes, ...], what: str) -> int:
    """The only index at which `block` stands in `lines`. Raises Drift that names `what` and shows what stands there."""
    starts = range(max(len(lines) - len(block) + 1, 1))
    equal_lines = [sum(map(bytes.__eq__, block, lines[start : start + len(block)])) for start in starts]
    matches = [start for start in starts if equal_lines[start] == len(block)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        places = ", ".join(str(start + 1) for start in matches)
        raise Drift(f"{what} fits at more than one place (lines {places}), so it is not clear which one is meant")
    nearest = max(starts, key=equal_lines.__getitem__)
    found = lines[nearest : nearest + len(block)]
    difference = difflib.ndiff(_text(block), _text(found))
    shown = "\n".join(f"    {line}" for line in difference if not line.startswith("?"))
    raise Drift(
        f"{what} does not fit. Nearest place: line {nearest + 1} "
        f"('-' the patch expects, '+' the file has):\n{shown}\n"
        "This is not the file of the release, with or without the patch. "
        "Reinstall SGLang, or take back the edit shown, and try again."
    )


def _text(lines: Sequence[bytes]) -> list[str]:
    return [line.decode("utf-8", "backslashreplace").rstrip("\n") for line in lines]


# ---- trees -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Tree:
    """An SGLang on disk and the series that belongs to its release."""

    base: Path  # the folder that holds `sglang/`
    release: str
    patches: tuple[Patch, ...]

    def read(self) -> Files:
        """The files that the series touches. Raises Drift if one is missing."""
        files = {}
        for patch in self.patches:
            for path in patch.hunks:
                if not (self.base / path).is_file():
                    raise Drift(f"{path}: {patch.name} changes it, but there is no such file in {self.base}")
                files[path] = (self.base / path).read_bytes()
        return files

    def __str__(self) -> str:
        return f"SGLang {self.release} in {self.base}"


def open_tree(root: Path | None = None, release: str | None = None) -> Tree:
    """Find SGLang and its series of patches.

    `root` is a site-packages folder, an SGLang checkout or its `python/` folder; None: the SGLang of this interpreter.
    `release` overrides what the tree says of itself. Raises PatchError if there is no SGLang or no series for it.
    """
    base = _find_base(root)
    release = release or _read_release(base)
    folder = patches_folder() / f"sglang-{release}"
    if not folder.is_dir():
        supported = sorted(known.name.removeprefix("sglang-") for known in patches_folder().glob("sglang-*"))
        raise PatchError(
            f"SGLang {release} in {base} is not supported. There are patches for: {', '.join(supported)}. "
            "If the tree is one of these under another version (an editable install often is), name it by --release."
        )
    names = (folder / "series").read_text().split()
    return Tree(base=base, release=release, patches=tuple(parse_patch(n, (folder / n).read_bytes()) for n in names))


def patches_folder() -> Path:
    """`patches/`: inside the package when installed from a wheel, beside it in an editable checkout."""
    package = Path(str(resources.files("er_sglang")))
    shipped = package / "patches"
    return shipped if shipped.is_dir() else package.parent / "patches"


def _find_base(root: Path | None) -> Path:
    if root is None:
        spec = importlib.util.find_spec("sglang")
        if spec is None or spec.origin is None:
            raise PatchError(f"no SGLang in {sys.executable}. Say where it is by --root.")
        return Path(spec.origin).parent.parent
    for base in (root.absolute(), root.absolute() / "python"):
        if (base / "sglang" / "__init__.py").is_file():
            return base
    raise PatchError(
        f"no SGLang in {root}: --root is a site-packages folder (holds sglang/), "
        "an SGLang checkout (holds python/sglang/) or its python/ folder."
    )


def _read_release(base: Path) -> str:
    # SGLang's build writes this file, into wheels and into checkouts installed with `pip install -e`;
    # sglang/version.py has no literal version.
    version_file = base / "sglang" / "_version.py"
    found = version_file.is_file() and re.search(r"__version__ = version = '([^'+]+)", version_file.read_text())
    if not found:
        raise PatchError(f"cannot tell the release of {base}: no version in {version_file}. Name it by --release.")
    return found[1]


def write_all(base: Path, files: Files) -> None:
    """Replace the files, all or none, keeping their modes. On any failure the old ones are put back."""
    contents = {(base / path).resolve(): content for path, content in files.items()}  # through symbolic links
    new = {target: target.with_name(f".{target.name}.er_sglang-new") for target in contents}
    old = {target: target.with_name(f".{target.name}.er_sglang-old") for target in contents}
    renamed = []
    try:
        for target, content in contents.items():
            shutil.copy2(target, old[target])  # putting back must not need disk space
            with open(new[target], "wb") as file:
                file.write(content)
                os.fsync(file.fileno())
            shutil.copymode(target, new[target])
        for target in contents:
            renamed.append(target)
            os.replace(new[target], target)
    except BaseException:  # Ctrl-C too
        for target in renamed:
            os.replace(old[target], target)
        raise
    finally:
        for leftover in (*new.values(), *old.values()):
            leftover.unlink(missing_ok=True)


# ---- command ---------------------------------------------------------------------------------------------------------


def apply(tree: Tree) -> int:
    """Apply what the tree lacks of its series. Raises Drift, with the tree untouched, where it does not fit."""
    files = tree.read()
    count = applied_count(files, tree.patches)
    missing = tree.patches[count:]
    if not missing:
        print(f"already applied: {tree}")
        return APPLIED
    write_all(tree.base, apply_in_memory(files, missing))
    print(f"applied {', '.join(patch.name for patch in missing)}: {tree}")
    return APPLIED


def _checked(tree: Tree) -> tuple[Files, int]:
    """The tree's files and how many patches they carry. Raises Drift unless the rest of the series would fit."""
    files = tree.read()
    count = applied_count(files, tree.patches)
    apply_in_memory(files, tree.patches[count:])
    return files, count


def verify(tree: Tree) -> int:
    """Say whether the whole series is applied. Raises Drift if it neither is nor could be."""
    _, count = _checked(tree)
    if count == len(tree.patches):
        print(f"applied: {tree}")
        return APPLIED
    print(f"not applied ({count} of {len(tree.patches)} patches): {tree}")
    return NOT_APPLIED


def revert(tree: Tree) -> int:
    """Take back what the tree carries of its series, byte for byte."""
    files, count = _checked(tree)
    if not count:
        print(f"nothing to revert: {tree}")
        return APPLIED
    applied = tree.patches[:count]
    write_all(tree.base, apply_in_memory(files, _inverse(applied)))
    print(f"reverted {', '.join(patch.name for patch in reversed(applied))}: {tree}")
    return APPLIED


_HELP = """\
Patch SGLang so that every process finds SELF_QUANT.

You need this only if something else than SGLang builds ServerArgs(speculative_algorithm="SELF_QUANT"), as slime,
veRL and NeMo-RL do in their Ray actors. `python -m sglang.launch_server` and sglang.Engine work without; `er-sglang
autoload` does the same without touching SGLang.

    er-sglang patch apply                                 the SGLang of this interpreter
    er-sglang patch apply --root /sgl-workspace/sglang    a checkout; after the trainer's own patches

apply   apply what is missing; says so if there is nothing to do
verify  exit code 0 if applied, 1 if not
revert  give back the files as they were, byte for byte

Exit code 2: refused, with the reason; then nothing was changed."""


def add_command(subparsers) -> None:
    parser = subparsers.add_parser(
        "patch",
        help="patch an SGLang tree (for trainers that build ServerArgs themselves)",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("apply", "verify", "revert"))
    parser.add_argument(
        "--root",
        type=Path,
        help="site-packages, an SGLang checkout or its python/ folder (default: the SGLang of this interpreter)",
    )
    parser.add_argument("--release", help="SGLang release of the tree, such as 0.5.15.post1 (default: what it says)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    action = {"apply": apply, "verify": verify, "revert": revert}[args.action]
    try:
        return action(open_tree(args.root, args.release))
    except (PatchError, OSError) as error:
        print(f"er-sglang patch {args.action}: {error}", file=sys.stderr)
        return REFUSED
