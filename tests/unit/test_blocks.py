"""How small-batch products are shared out: what was measured best on an H200 stays chosen, and every choice can run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from er_sglang.quantize.blocks import MAX_M, SHARED_BYTES, SPLITS, TILE_N, UNIT_K, choose_blocks, shared_bytes

H200 = 132  # multiprocessors


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
        (24, 5120, 13824, (4, 2, 5)),
        (32, 7168, 5120, (4, 2, 4)),
        (32, 4608, 3584, (4, 2, 5)),
        (24, 27648, 5120, None),
        (32, 37888, 3584, None),
        (33, 5120, 5120, None),
    ],
)
def test_what_was_best_is_chosen(m, n, k, blocks):
    """Each within 8 % of the fastest of all shapes and Marlin."""
    assert choose_blocks(m, n, k, H200) == blocks


@given(
    m=st.integers(1, MAX_M),
    n=st.integers(1, 2500).map(lambda tiles: tiles * TILE_N),
    k=st.integers(2, 400).map(lambda units: units * UNIT_K),
    multiprocessors=st.sampled_from([78, 114, H200]),
)
def test_every_choice_can_run(m, n, k, multiprocessors):
    blocks = choose_blocks(m, n, k, multiprocessors)
    if blocks is None:
        assert m > 16
        return
    assert (blocks.warps_n, blocks.warps_k) in ((4, 2), (2, 4), (4, 1)) and blocks.splits in SPLITS
    assert shared_bytes(m, k, blocks) <= SHARED_BYTES


def test_a_wide_product_whose_x_is_too_large_is_cut():
    """Gate and up of a 70B on two GPUs, at 16 rows: unsplit, x alone would take 256 KiB."""
    assert choose_blocks(16, 28672, 8192, H200).splits >= 2
