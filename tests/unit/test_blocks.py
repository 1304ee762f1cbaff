"""How int4 products are shared out: what was measured best on an H200 or H100 stays chosen, and every choice can
run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from er_sglang.quantize.blocks import (
    MAX_SPLITS,
    SHARED_BYTES,
    SMALL_BATCH,
    SPLITS,
    TILE_N,
    UNIT_K,
    choose_blocks,
    choose_splits,
    shared_bytes,
)

H200 = 132  # multiprocessors
H100_CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)  # that one ran at once, of 1 to 8 blocks that fill a multiprocessor


@pytest.mark.parametrize(
    ("m", "n", "k", "blocks"),
    [
        (1, 3584, 18944, (2, 4, 8)),  # 7B: down
        (16, 3584, 18944, (4, 2, 8)),
        (1, 37888, 3584, (4, 1, 4)),  # gate and up
        (16, 37888, 3584, (4, 1, 2)),
        (8, 7168, 5120, (4, 2, 8)),  # 14B: qkv
        (16, 7168, 5120, (4, 2, 4)),
        (1, 5120, 5120, (2, 4, 5)),  # o
        (1, 27648, 5120, (4, 2, 2)),  # gate and up
        (16, 27648, 5120, (4, 2, 1)),
        (1, 5120, 13824, (2, 4, 5)),  # down
        (16, 5120, 13824, (4, 2, 5)),
    ],
)
def test_what_was_best_is_chosen(m, n, k, blocks):
    """Each within 8 % of the fastest of all shapes."""
    assert choose_blocks(m, n, k, H200) == blocks


@given(
    m=st.integers(1, SMALL_BATCH),
    n=st.integers(1, 2500).map(lambda tiles: tiles * TILE_N),
    k=st.integers(2, 400).map(lambda units: units * UNIT_K),
    multiprocessors=st.sampled_from([78, 114, H200]),
)
def test_every_choice_can_run(m, n, k, multiprocessors):
    blocks = choose_blocks(m, n, k, multiprocessors)
    assert (blocks.warps_n, blocks.warps_k) in ((4, 2), (2, 4), (4, 1)) and blocks.splits in SPLITS
    assert shared_bytes(m, k, blocks) <= SHARED_BYTES


def test_a_wide_product_whose_x_is_too_large_is_cut():
    """Gate and up of a 70B on two GPUs, at 16 rows: unsplit, x alone would take 256 KiB."""
    assert choose_blocks(16, 28672, 8192, H200).splits >= 2


@pytest.mark.parametrize(
    ("n", "k", "splits"),
    [
        (7168, 5120, 4),  # 14B: qkv
        (5120, 5120, 5),  # o
        (27648, 5120, 1),  # gate and up
        (5120, 13824, 5),  # down
    ],
)
def test_the_best_splits_are_chosen(n, k, splits):
    """Fastest of 1 to 8 at 33 to 128 rows."""
    assert choose_splits(n, k, H100_CLUSTERS) == splits


@given(
    n=st.integers(1, 2500).map(lambda tiles: tiles * TILE_N), k=st.integers(1, 400).map(lambda units: units * UNIT_K)
)
def test_every_split_has_a_unit(n, k):
    assert 1 <= choose_splits(n, k, H100_CLUSTERS) <= min(MAX_SPLITS, k // UNIT_K)


def test_clusters_that_do_not_fit_at_once_are_avoided():
    """With one cluster of five less than 14B's o and down have columns, a second wave would double their time."""
    fewer = (*H100_CLUSTERS[:4], 19, *H100_CLUSTERS[5:])
    assert choose_splits(5120, 13824, fewer) == 4
