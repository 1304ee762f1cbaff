"""How an int4 product is shared out over a Hopper chip. Pure Python; the numbers are those of the three kernels. Every
product of an eager step asks for its choice, so each is made once.

Up to SMALL_BATCH rows `small_batch_gemm.cuh` multiplies, up to MAX_ROWS `wgmma_gemm.cuh`; up to FUSED_ROWS
`fused_layer.cuh` can multiply all of a layer.
"""

import functools
from typing import NamedTuple

SMALL_BATCH = 8  # rows
MAX_ROWS = 128
FUSED_ROWS = 8
UNIT_K = 128  # of K, what a warp multiplies at a time
TILE_N = 64  # of N, likewise
SHARED_BYTES = 227 * 1024  # of a multiprocessor
MOST_FILL = 0.9  # blocks of a cluster share a part of the chip (GPC): its last tenth cannot be counted on
SPLITS = (1, 2, 4, 5, 8)  # a GPC has 16 or 18 multiprocessors: clusters of 3, 6 and 7 pack badly


class Blocks(NamedTuple):
    """`warps_n` x `warps_k` warps a block; `splits` blocks, a cluster, share the columns of K."""

    warps_n: int
    warps_k: int
    splits: int


# Blocks of that many warps that a multiprocessor's registers hold. Wide blocks read x less often and come first; narrow
# ones fill the chip where those leave a gap.
RESIDENT = {(4, 2): 2, (2, 4): 2, (4, 1): 5}

WGMMA_BLOCK_N = 256
MAX_SPLITS = 8  # blocks of a cluster
WAVE_UNITS = 8  # that a block could have multiplied while it starts and ends


class Wave(NamedTuple):
    """The next `columns` blocks of columns, each shared by `splits` blocks, a cluster."""

    columns: int
    splits: int


Waves = tuple[Wave, ...]
"""A product by the wgmma kernel: a launch each."""

FUSED_WARPS = 8  # of a block that multiply
MAX_STRIPS = 8
X_ROW_BYTES = UNIT_K * 2  # of a row of a unit of x, in shared memory
HEAD_BYTES = 2048  # of a launch's products and barriers, at most
WEIGHT_BYTES = 2 * FUSED_WARPS * (UNIT_K * TILE_N // 2 + TILE_N * 2)  # of two stages of each ring, the fewest
GOOD_X_BYTES = 50_000  # leave room for more


def shared_bytes(k: int, blocks: Blocks) -> int:
    """Shared memory of a block: its part of x, and later in the same place its parts of y; then what it is sent of the
    others', pairs of float32 of two halves, for whole warps."""
    block_n = blocks.warps_n * TILE_N
    x_bytes = SMALL_BATCH * (-(-(k // UNIT_K) // blocks.splits) * UNIT_K + 8) * 2
    y_bytes = blocks.warps_k * SMALL_BATCH * (block_n + 4) * 4
    share = -(-(SMALL_BATCH * block_n // 4) // (32 * blocks.splits)) * 32
    return max(x_bytes, y_bytes) + blocks.splits * 2 * share * 8


@functools.cache
def choose_blocks(n: int, k: int, multiprocessors: int) -> Blocks:
    """For up to SMALL_BATCH rows: fills the chip best with blocks that all run at once, each warp with 1.7 units of
    K or more, on average."""
    best, best_fill = None, 0.0
    for (warps_n, warps_k), by_registers in RESIDENT.items():
        columns = -(-n // (TILE_N * warps_n))
        for splits in SPLITS:
            blocks = Blocks(warps_n, warps_k, splits)
            resident = min(by_registers, SHARED_BYTES // shared_bytes(k, blocks)) * multiprocessors
            if columns * splits <= MOST_FILL * resident and k // UNIT_K >= 1.7 * splits * warps_k:
                if columns * splits / resident > best_fill + 0.02:
                    best, best_fill = blocks, columns * splits / resident
    # A product too large for one wave, or too small to be cut: the fewest blocks that hold their part of x.
    fewest = (blocks for splits in SPLITS if shared_bytes(k, blocks := Blocks(2, 4, splits)) <= SHARED_BYTES)
    return best or next(fewest)


@functools.cache
def choose_waves(n: int, k: int, resident_clusters: tuple[int, ...]) -> Waves:
    """For up to MAX_ROWS rows: so that the busiest multiprocessor has the least to do.

    `resident_clusters[i]`: clusters of i + 1 blocks that the chip runs at once. A block fills a multiprocessor; blocks
    of a cluster must share a part of the chip (GPC), so some sizes leave a sixth or more of it idle. What full waves
    leave over is cut finer, in a launch of its own: else a few blocks would take as long as a wave.
    """
    units, all_splits = k // UNIT_K, range(1, min(MAX_SPLITS, k // UNIT_K) + 1)

    def time(wave: Wave) -> int:  # of the busiest multiprocessor, in units
        rounds = -(-wave.columns // resident_clusters[wave.splits - 1])
        return rounds * (WAVE_UNITS + -(-units // wave.splits))

    def in_one(columns: int) -> Waves:
        return (min((Wave(columns, splits) for splits in all_splits), key=time),)

    columns = -(-n // WGMMA_BLOCK_N)
    plans = [in_one(columns)]
    for splits in all_splits:
        rest = columns % resident_clusters[splits - 1]
        if 0 < rest < columns:
            plans.append((Wave(columns - rest, splits), *in_one(rest)))
    return min(plans, key=lambda waves: sum(map(time, waves)))


@functools.cache
def choose_strips(n: int, k: int, rows: int, multiprocessors: int) -> int | None:
    """Of a product in a fused layer, for up to FUSED_ROWS rows: strips of K, as few as hold their part of x; None if
    the product cannot be shared out, or x leaves too little room for weights.

    A block runs on every multiprocessor, as many for each strip. Pieces of TILE_N x UNIT_K, column after column of a
    strip, are shared out evenly over its blocks, and a block's over its warps. A block has a column or more, so that no
    more than two blocks share one; a warp has parts of two columns at most.
    """
    units = k // UNIT_K

    def fits(strips: int) -> bool:
        if units % strips or multiprocessors % strips:
            return False
        strip, blocks = units // strips, multiprocessors // strips
        least, rest = divmod(strip * (n // TILE_N), blocks)  # pieces of a block
        return blocks > 1 and 1 < strip <= least and -(-(least + (rest > 0)) // FUSED_WARPS) <= strip

    def x_bytes(strips: int) -> int:
        return units // strips * rows * X_ROW_BYTES

    fitting = [strips for strips in range(1, MAX_STRIPS + 1) if fits(strips)]
    parts_bytes = FUSED_WARPS * rows * (TILE_N + 4) * 4  # of warps' sums
    most_x_bytes = SHARED_BYTES - HEAD_BYTES - WEIGHT_BYTES - parts_bytes
    small = (strips for strips in fitting if x_bytes(strips) <= GOOD_X_BYTES)
    return next(small, min((s for s in fitting if x_bytes(s) <= most_x_bytes), key=x_bytes, default=None))
