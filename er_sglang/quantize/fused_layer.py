"""A decoder layer's int4 products and norms in one launch, for up to 8 rows on Hopper: launches `fused_layer.cuh`."""

from itertools import takewhile

import torch

from er_sglang.quantize.base import LayerNorms, LayerProducts, Packed
from er_sglang.quantize.blocks import FUSED_ROWS, TILE_N, choose_strips
from er_sglang.quantize.modules import fused_layer_module

DTYPE = torch.bfloat16
GROUP_SIZE = 128
# Rounds of the next launch's weights, a piece for each warp of each block, that a launch of one row brings into L2; of more rows
# fewer, for the attention in between then needs memory itself.
AHEAD_ROUNDS = 4
MAX_HIDDEN = 8192  # of the norms
NOTHING = -1  # kNothing in exchange.cuh


class FusedLayer:
    """Deterministic. Launches share a place for their sums: one stream at a time."""

    def __init__(self, *, device: torch.device) -> None:
        self._run = fused_layer_module().run
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._device = device
        self._scratch: dict[tuple[tuple[int, int], ...], torch.Tensor] = {}  # by shapes, one for all their layers
        self._none = torch.empty(0, dtype=DTYPE, device=device)

    def most_rows(self, products: LayerProducts) -> int:
        """Up to how many rows these, in DTYPE, can be multiplied by; makes room for their sums."""
        shapes = _shapes(products)
        following = _shapes((products.next_o, products.next_gate_up))
        if following != shapes[:2] or products.o.n > MAX_HIDDEN:
            return 0
        fitting = list(takewhile(lambda rows: None not in self._strips(products, rows), range(1, FUSED_ROWS + 1)))
        if fitting and shapes not in self._scratch:
            ints = max(self._scratch_ints(products, rows) for rows in fitting)
            self._scratch[shapes] = torch.full((ints,), NOTHING, dtype=torch.int32, device=self._device)
        return len(fitting)

    def __call__(
        self,
        products: LayerProducts,
        x_MK: torch.Tensor,
        residual_MH: torch.Tensor,
        norms: LayerNorms,
        bias_N: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `Format.apply_layer`, of products that fit."""
        rows = len(x_MK)
        y_MN = x_MK.new_empty(rows, products.qkv.n)
        self._run(
            x_MK,
            residual_MH,
            norms.first_H,
            norms.second_H,
            self._none if bias_N is None else bias_N,
            y_MN,
            *(tensor for packed in products for tensor in (packed.codes, packed.scales)),
            self._scratch[_shapes(products)],
            norms.eps,
            self._multiprocessors,  # a block on each
            *self._strips(products, rows),
            AHEAD_ROUNDS // rows,
        )
        return y_MN

    def _strips(self, products: LayerProducts, rows: int) -> list[int | None]:
        return [choose_strips(n, k, rows, self._multiprocessors) for n, k in _shapes(products)]

    def _scratch_ints(self, products: LayerProducts, rows: int) -> int:
        """The launch's number; a product's y and the squares of a norm, twice; parts of sums."""
        ints = 4
        for name, packed, strips in zip(products._fields, products, self._strips(products, rows)):
            halves = 2 if name == "gate_up" else 1
            outputs, parts = packed.n // TILE_N // halves, strips * halves * 2
            ints += outputs * (2 * FUSED_ROWS * (TILE_N // 2 + 1) + parts * rows * TILE_N)
        return ints


def _shapes(products: LayerProducts | tuple[Packed, ...]) -> tuple[tuple[int, int], ...]:
    """(n, k) of what a launch multiplies by: the first four."""
    return tuple((packed.n, packed.k) for packed in products[:4])
