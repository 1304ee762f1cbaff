"""How a small-batch product is shared out over a Hopper chip. Pure Python; the numbers are those of `small_batch_gemm.cuh`."""

from typing import NamedTuple

MAX_M = 32  # rows
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


# Blocks of that many warps that a multiprocessor's registers hold, for up to 8 rows, up to 16, and more. Wide blocks read x
# less often and come first; narrow ones fill the chip where those leave a gap.
RESIDENT = (
    {(4, 2): 2, (2, 4): 2, (4, 1): 5},
    {(4, 2): 1, (2, 4): 1, (4, 1): 3},
    {(4, 2): 1, (2, 4): 1, (4, 1): 2},
)
# Above 16 rows a multiprocessor is busy with its weights for longer than they take to arrive: with more of them than this
# Marlin, slow to start and to end, is ahead (H200: 70 million weights in 24 rows take 23 us against 31, 140 million 41 against 38).
MOST_WEIGHTS_ABOVE_16_ROWS = 640 * 1024


def shared_bytes(m: int, k: int, blocks: Blocks) -> int:
    """Shared memory of a block: its part of x, and later in the same place its parts of y."""
    rows = 8 * -(-m // 8)
    x_bytes = rows * (-(-(k // UNIT_K) // blocks.splits) * UNIT_K + 8) * 2
    y_bytes = blocks.warps_k * rows * (blocks.warps_n * TILE_N + 4) * 4
    return max(x_bytes, y_bytes)


def choose_blocks(m: int, n: int, k: int, multiprocessors: int) -> Blocks | None:
    """The shape that fills the chip best with blocks that all run at once, each warp with about two units of K or more.

    None where Marlin is faster.
    """
    if m > MAX_M or (m > 16 and n * k > MOST_WEIGHTS_ABOVE_16_ROWS * multiprocessors):
        return None
    best, best_fill = None, 0.0
    for (warps_n, warps_k), by_registers in RESIDENT[min(-(-m // 8), len(RESIDENT)) - 1].items():
        columns = -(-n // (TILE_N * warps_n))
        for splits in SPLITS:
            blocks = Blocks(warps_n, warps_k, splits)
            resident = min(by_registers, SHARED_BYTES // shared_bytes(m, k, blocks)) * multiprocessors
            if columns * splits <= MOST_FILL * resident and k // UNIT_K >= 1.7 * splits * warps_k:
                if columns * splits / resident > best_fill + 0.02:
                    best, best_fill = blocks, columns * splits / resident
    # A product too large for one wave, or too small to be cut: the fewest blocks that hold their part of x.
    fewest = (blocks for splits in SPLITS if shared_bytes(m, k, blocks := Blocks(4, 2, splits)) <= SHARED_BYTES)
    return best or next(fewest, None)
