"""Parts of a layer of a drafted token, in a chain: `python parts.py TAG MODEL ROWS...`, in the tree to be timed. Microseconds.

With joined.diff applied, `norm` and `all` leave norms to the products; `unnormed` and `residual` are their halves.
"""

import sys

import torch

from er_sglang.bench import layer as bench
from er_sglang.bench.layer import DTYPE, EPS, SHAPES, Layers, create_format, graph_us, heads
from er_sglang.drafting import early
from er_sglang.drafting.attention import attend, scratch
from er_sglang.quantize import hopper

TOKENS = 320
JOINS = hasattr(hopper, "Residual")
CUDA = torch.device("cuda")


class Parts(Layers):
    def times_us(self, rows: int) -> dict[str, float]:
        shapes, (heads_q, heads_k, head_dim) = self.shapes(rows), heads(self._shape)
        hidden = self._shape["hidden_size"]
        x, residual = torch.randn(2, rows, hidden, dtype=DTYPE, device=CUDA)
        qkv, gated = (x.new_empty(rows, n) for n in (self.products["qkv"][0], self.products["down"][1]))
        attended = x.new_empty(rows, heads_q * head_dim)
        ones = torch.ones(hidden, dtype=DTYPE, device=CUDA)
        k_cache, v_cache = torch.randn(2, len(self), rows * TOKENS, heads_k, head_dim, dtype=DTYPE, device=CUDA)
        table = torch.arange(rows * TOKENS, dtype=torch.int32, device=CUDA).view(rows, TOKENS)
        requests, lengths = torch.arange(rows, device=CUDA), torch.full((rows,), TOKENS, device=CUDA)
        positions, slots = lengths - 1, table[:, -1].long()
        cos_sin = torch.randn(TOKENS, head_dim, device=CUDA)
        space = scratch(rows, heads_k, head_dim, CUDA)
        sizes = [heads_q * head_dim, heads_k * head_dim, heads_k * head_dim]
        unnormed = joined = {}
        if JOINS:
            joined = {"residual": hopper.Residual(residual, ones, bench.empty_squares(x).fill_(1.0))}
            unnormed = {"unnormed": bench.Unnormed(joined["residual"].squares, EPS)}

        def product(packed: dict, name: str, a_MK: torch.Tensor, y_MN: torch.Tensor, **norm) -> None:
            self._gemm(packed[name], a_MK, None, y_MN, shapes[name], gated=name == "gate_up", **norm)

        def variant(norm=False, attends=False, rotates=False, divides=True, adds=True):
            before, after = unnormed if norm and divides else {}, joined if norm and adds else {}

            def step(i: int) -> None:
                packed = self._layers[i]
                if norm and not JOINS:
                    early.add_rms_norm_(x, residual, ones, EPS)
                product(packed, "qkv", x, qkv, **before)
                y = attended
                if attends:
                    q = attended.view(rows, heads_q, head_dim)
                    if rotates:
                        parts = (part.unflatten(1, (-1, head_dim)) for part in qkv.split(sizes, 1))
                        q = early.rope_store_(*parts, k_cache[i], v_cache[i], cos_sin, positions, slots)
                    y = attend(q, k_cache[i], v_cache[i], table, requests, lengths, *space, head_dim**-0.5).flatten(1)
                product(packed, "o", y, x, **after)
                if norm and not JOINS:
                    early.add_rms_norm_(x, residual, ones, EPS)
                product(packed, "gate_up", x, gated, **before)
                product(packed, "down", gated, x, **after)

            return step

        steps = {
            "A": variant(),  # products alone
            "norm": variant(norm=True),
            "attend": variant(attends=True),
            "rot+attend": variant(attends=True, rotates=True),
            "all": variant(True, True, True),
        }
        if JOINS:
            steps |= {"unnormed": variant(norm=True, adds=False), "residual": variant(norm=True, divides=False)}
        return {name: round(min(graph_us(step, len(self)) for _ in range(2)), 2) for name, step in steps.items()}


tag, model, *all_rows = sys.argv[1:]
layers = Parts(SHAPES[model], create_format("int4", group_size=128, device=CUDA))
for rows in map(int, all_rows):
    print(tag, model, rows, layers.times_us(rows), flush=True)
