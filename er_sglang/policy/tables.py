"""Arithmetic of measured tables, seconds by (batch, context): interpolation, monotone repair, completion."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from er_sglang.errors import ConfigError

Table = tuple[tuple[float, ...], ...]  # [batch][context]


class ProfileError(ConfigError):
    """The table cannot be used as it is; the message says why and what to do."""


def locate(axis: Sequence[int], x: float) -> tuple[int, float]:
    """Segment of x and the position in it: 0 at its left end, above 1 beyond the axis; the first point before it."""
    if x <= axis[0] or len(axis) == 1:
        return 0, 0.0
    i = min(bisect_right(axis, x), len(axis) - 1) - 1
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def blend(table: Table, i: int, u: float, j: int, v: float) -> float:
    """Bilinear, in segments i and j at positions u and v."""
    row = table[i]
    value = row[j] + v * (row[j + 1] - row[j]) if v else row[j]
    if not u:
        return value
    row = table[i + 1]
    return value + u * ((row[j] + v * (row[j + 1] - row[j]) if v else row[j]) - value)


def isotonic(cells: Mapping[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """Least-squares repair to non-decreasing: along batch, along context, and again until neither moves.

    Of logarithms, since errors of measurement are relative, and one wild cell must not lift its whole row.
    """
    repaired = {cell: math.log(value) for cell, value in cells.items()}
    lines = [
        [sorted(cell for cell in cells if cell[axis] == value) for value in sorted({cell[axis] for cell in cells})]
        for axis in (0, 1)
    ]
    for _ in range(100):
        before = dict(repaired)
        for axis_lines in lines:
            for line in axis_lines:
                repaired.update(zip(line, _pool_adjacent_violators([repaired[cell] for cell in line])))
        if all(abs(repaired[cell] - before[cell]) <= 1e-9 for cell in cells):
            break
    return {cell: math.exp(value) for cell, value in repaired.items()}


def _pool_adjacent_violators(values: Sequence[float]) -> list[float]:
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            other, other_size = blocks.pop()
            mean, size = (mean * size + other * other_size) / (size + other_size), size + other_size
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


def complete(cells: Mapping[tuple[int, int], float], batches: Sequence[int], contexts: Sequence[int]) -> Table:
    """Fill unavailable cells: a straight line in batch through two measured batches of that context.

    They are the nearest, and the one nearest to half of it: time is a staircase, and neighbours may be on two stairs.
    """
    columns = []
    for context in contexts:
        known = [batch for batch in batches if (batch, context) in cells]
        if len(known) < min(2, len(batches)):
            raise ProfileError(
                f"context {context} needs at least two measured batch sizes, has {known}: measure more, or leave it out"
            )
        column = []
        for batch in batches:
            if (batch, context) in cells:
                column.append(cells[batch, context])
                continue
            near = min(known, key=lambda other: abs(other - batch))
            far = min((other for other in known if other != near), key=lambda other: abs(other - near / 2))
            slope = (cells[near, context] - cells[far, context]) / (near - far)
            column.append(cells[near, context] + slope * (batch - near))
        columns.append(column)
    return tuple(zip(*columns))
