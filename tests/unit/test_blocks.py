"""How int4 products are shared out: what was measured best on an H200 or H100 stays chosen, and every choice can
run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from er_sglang.bench.gemm import products
from er_sglang.bench.shapes import SHAPES
from er_sglang.quantize.blocks import (
    FUSED_ROWS,
    FUSED_WARPS,
    MAX_SPLITS,
    MAX_STRIPS,
    SHARED_BYTES,
    SPLITS,
    TILE_N,
    UNIT_K,
    WGMMA_BLOCK_N,
    choose_blocks,
    choose_strips,
    choose_waves,
    shared_bytes,
)

H200 = 132  # multiprocessors
H100_CLUSTERS = (132, 66, 39, 30, 22, 17, 15, 15)  # that one ran at once, of 1 to 8 blocks that fill a multiprocessor

columns = st.integers(1, 2500).map(lambda tiles: tiles * TILE_N)


@pytest.mark.parametrize(
    ("n", "k", "blocks"),
    [
        (3584, 18944, (2, 4, 8)),  # 7B: down
        (37888, 3584, (4, 1, 4)),  # gate and up
        (7168, 5120, (4, 2, 8)),  # 14B: qkv
        (5120, 5120, (2, 4, 5)),  # o
        (27648, 5120, (4, 2, 2)),  # gate and up
        (5120, 13824, (2, 4, 5)),  # down
        (152064, 5120, (2, 4, 1)),  # lm_head
    ],
)
def test_what_was_best_is_chosen(n, k, blocks):
    """Each within 2 % of a layer's time with the fastest of all shapes, at 1 and 8 rows; lm_head is the fastest."""
    assert choose_blocks(n, k, H200) == blocks


@given(
    n=columns, k=st.integers(2, 400).map(lambda units: units * UNIT_K), multiprocessors=st.sampled_from([78, 114, H200])
)
def test_every_choice_can_run(n, k, multiprocessors):
    blocks = choose_blocks(n, k, multiprocessors)
    assert (blocks.warps_n, blocks.warps_k) in ((4, 2), (2, 4), (4, 1)) and blocks.splits in SPLITS
    assert shared_bytes(k, blocks) <= SHARED_BYTES


@pytest.mark.parametrize(
    ("n", "k", "waves"),
    [
        (7168, 5120, [(28, 4)]),  # 14B: qkv
        (5120, 5120, [(20, 5)]),  # o
        (27648, 5120, [(108, 1)]),  # gate and up
        (5120, 13824, [(20, 5)]),  # down
        (24576, 4096, [(96, 1)]),  # Qwen3-8B: gate and up; with 8 splits, a layer takes a quarter longer
        (55296, 5120, [(216, 1)]),  # 32B: likewise
    ],
)
def test_the_best_splits_are_chosen(n, k, waves):
    """Fastest of 1 to 8 at 32 to 128 rows, or within 1.5 % of a layer's time."""
    assert choose_waves(n, k, H100_CLUSTERS) == tuple(waves)


@given(n=columns, k=st.integers(1, 400).map(lambda units: units * UNIT_K))
def test_waves_cover_all_columns_and_every_split_has_a_unit(n, k):
    waves = choose_waves(n, k, H100_CLUSTERS)
    assert sum(wave.columns for wave in waves) == -(-n // WGMMA_BLOCK_N)
    assert all(wave.columns > 0 and 1 <= wave.splits <= min(MAX_SPLITS, k // UNIT_K) for wave in waves)


def test_a_few_columns_more_than_a_wave_do_not_cost_a_second_one():
    """7B's gate and up: 148 blocks of columns on 132 multiprocessors."""
    assert choose_waves(37888, 3584, H100_CLUSTERS) == ((132, 1), (16, 6))


def test_clusters_that_do_not_fit_at_once_are_avoided():
    """With one cluster of five less than 14B's o and down have columns, a second wave would double their time."""
    fewer = (*H100_CLUSTERS[:4], 19, *H100_CLUSTERS[5:])
    assert choose_waves(5120, 13824, fewer) == ((20, 4),)


@pytest.mark.parametrize("model", ["7b", "14b", "32b", "qwen3-4b", "qwen3-8b"])
def test_layers_can_be_fused(model):
    for name, (n, k) in products(SHAPES[model]).items():
        if name != "lm_head":
            assert all(choose_strips(n, k, rows, H200) for rows in range(1, FUSED_ROWS + 1))


def test_a_product_too_small_to_share_out_has_no_strips():
    assert choose_strips(896, 896, 1, H200) is None  # 0.5B: o


@pytest.mark.parametrize(
    ("n", "k", "strips"),
    [
        (5120, 13824, [2, 2, 2, 3, 3, 4, 4, 6]),  # 14B: down
        (27648, 5120, [1, 1, 1, 1, 2, 2, 2, 2]),  # gate and up
        (5120, 27648, [2, 3, 4, 6, 6, 6, 6, 6]),  # 32B: down, of which more than 50 KB are left at 7 rows
        (3584, 18944, [4, 4, 4, 4, 4, 4, 4, 4]),  # 7B: down; nothing but 4 divides its units and leaves blocks a column
    ],
)
def test_more_rows_take_more_strips(n, k, strips):
    assert [choose_strips(n, k, rows, H200) for rows in range(1, FUSED_ROWS + 1)] == strips


@given(
    n=columns,
    k=st.integers(2, 400).map(lambda units: units * UNIT_K),
    rows=st.integers(1, FUSED_ROWS),
    multiprocessors=st.sampled_from([78, 114, H200]),
)
def test_strips_are_whole_and_shared_by_two(n, k, rows, multiprocessors):
    """A strip's column by no more than two blocks, two columns by no more than a warp."""
    units, strips = k // UNIT_K, choose_strips(n, k, rows, multiprocessors)
    if strips is None:
        return
    assert choose_strips(n, k, 1, multiprocessors)
    assert 1 <= strips <= MAX_STRIPS and units % strips == 0 and units // strips > 1
    assert multiprocessors % strips == 0 and multiprocessors > strips
    least, rest = divmod(units // strips * (n // TILE_N), multiprocessors // strips)
    assert least >= units // strips
    assert -(-(least + (rest > 0)) // FUSED_WARPS) <= units // strips
