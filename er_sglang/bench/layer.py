"""Time a layer of a drafted token: its int4 products and the small kernels and attention between them, as a draft chain
runs them, and the floor of reading its weights, keys and values once.

    python -m er_sglang.bench.layer --model 14b --rows 1 8 16 32 64 128 --all-shapes

Layers, whose weights together exceed the L2 cache, run one after another in a CUDA graph: programmatic dependent launch
lets kernels overlap here as it does in a chain, which a product by itself cannot show. A few rows are served by a kernel for
all of a layer but its attention, where it can; "apart" is the same layer, product by product. `--all-shapes` exchanges the
shape of one product at a time, of these. Needs a Hopper GPU and SGLang.
"""

from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from er_sglang.bench.gemm import all_shapes, argument_parser, clone, products, shape_text
from er_sglang.bench.shapes import SHAPES, heads
from er_sglang.bench.timing import L2_BYTES, copy_bandwidth, graph_us
from er_sglang.quantize import Format, Packed, create_format
from er_sglang.quantize.base import LayerNorms, LayerProducts
from er_sglang.quantize.blocks import MAX_ROWS, Blocks, Waves
from er_sglang.quantize.hopper import is_hopper
from er_sglang.tools.results import write_rows
from er_sglang.tools.serving import ON_CPU

DTYPE = torch.bfloat16
EPS = 1e-6

Shapes = dict[str, Blocks | Waves]
"""How each product of a layer is shared out."""


class Layers:
    """So many layers of a model's shape, in int4, all with the same numbers."""

    def __init__(self, shape: dict, fmt: Format) -> None:
        self._shape = shape
        self.products = {name: nk for name, nk in products(shape).items() if name != "lm_head"}
        first = {}
        for name, (n, k) in self.products.items():
            first[name] = fmt.allocate(n, k, DTYPE, torch.device("cuda"))
            fmt.refresh_(first[name], torch.randn(n, k, device="cuda", dtype=DTYPE) * k**-0.5)
        self.weight_bytes = sum(packed.nbytes for packed in first.values())
        self._fmt = fmt
        self._gemm = fmt._hopper_gemm[DTYPE]
        self._layers = [first] + [
            {name: clone(packed) for name, packed in first.items()}
            for _ in range(4 * L2_BYTES // self.weight_bytes + 1)
        ]
        self._fused_rows = fmt.fused_rows(self._products(0))

    def __len__(self) -> int:
        return len(self._layers)

    def shapes(self, rows: int) -> Shapes:
        """Those that serve."""
        return {name: self._gemm.shape(rows, packed) for name, packed in self._layers[0].items()}

    def fuses(self, rows: int) -> bool:
        """Whether one kernel serves."""
        return rows <= self._fused_rows

    def kv_bytes(self, rows: int, tokens: int) -> int:
        _, heads_k, head_dim = heads(self._shape)
        return 2 * rows * tokens * heads_k * head_dim * DTYPE.itemsize

    def us(self, rows: int, tokens: int, shapes: Shapes | None, *, between: bool = True) -> float:
        """Microseconds of a layer with `rows` requests that read `tokens` of their contexts, by one kernel if there are no
        `shapes`; without what lies between the products, if not `between`."""
        return graph_us(self._step(rows, tokens, shapes, between), len(self))

    def _products(self, i: int) -> LayerProducts:
        layer, following = self._layers[i], self._layers[(i + 1) % len(self)]
        return LayerProducts(
            *(layer[name] for name in ("o", "gate_up", "down")), *(following[name] for name in ("qkv", "o", "gate_up"))
        )

    def _step(self, rows: int, tokens: int, shapes: Shapes | None, between: bool) -> Callable[[int], None]:
        from er_sglang.drafting import early
        from er_sglang.drafting.attention import attend, scratch

        heads_q, heads_k, head_dim = heads(self._shape)
        hidden, device = self._shape["hidden_size"], torch.device("cuda")
        x, residual = torch.randn(2, rows, hidden, dtype=DTYPE, device=device)
        qkv, gated = (x.new_zeros(rows, n) for n in (self.products["qkv"][0], self.products["down"][1]))
        ones = torch.ones(hidden, dtype=DTYPE, device=device)
        k_cache, v_cache = torch.randn(2, len(self), rows * tokens, heads_k, head_dim, dtype=DTYPE, device=device)
        req_to_token = torch.arange(rows * tokens, dtype=torch.int32, device=device).view(rows, tokens)
        requests, lengths = torch.arange(rows, device=device), torch.full((rows,), tokens, device=device)
        positions, slots = lengths - 1, req_to_token[:, -1].long()
        cos_sin = torch.randn(tokens, head_dim, device=device)
        space = scratch(rows, heads_k, head_dim, device)
        sizes = [heads_q * head_dim, heads_k * head_dim, heads_k * head_dim]

        def product(layer: dict[str, Packed], name: str, a_MK: torch.Tensor, y_MN: torch.Tensor) -> torch.Tensor:
            self._gemm(layer[name], a_MK, None, y_MN, shapes[name], gated=name == "gate_up")
            return y_MN

        def attention(i: int) -> torch.Tensor:
            q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv.split(sizes, 1))
            q = early.rope_store_(q, k, v, k_cache[i], v_cache[i], cos_sin, positions, slots)
            y = attend(q, k_cache[i], v_cache[i], req_to_token, requests, lengths, *space, head_dim**-0.5)
            return y.flatten(1)

        def fused(i: int) -> None:  # whose qkv the attention does not read: its time does not depend on it
            self._fmt.apply_layer(self._products(i), attention(i), residual, LayerNorms(ones, ones, EPS), None)

        def apart(i: int) -> None:
            layer = self._layers[i]
            early.add_rms_norm_(x, residual, ones, EPS)
            product(layer, "qkv", x, qkv)
            product(layer, "o", attention(i), x)
            early.add_rms_norm_(x, residual, ones, EPS)
            product(layer, "down", product(layer, "gate_up", x, gated), x)

        def only_products(i: int) -> None:
            layer = self._layers[i]
            product(layer, "o", product(layer, "qkv", x, qkv)[:, : sizes[0]], x)
            product(layer, "down", product(layer, "gate_up", x, gated), x)

        if shapes is None:
            return fused
        return apart if between else only_products


def measure(layers: Layers, all_rows: list[int], tokens: int, every_shape: bool, bandwidth: float) -> Iterator[dict]:
    """A table row per number of rows; bandwidth in bytes per second."""
    for rows in tqdm(all_rows, desc="rows"):
        served = layers.shapes(rows)
        apart_us = layers.us(rows, tokens, served)
        row = {
            "rows": rows,
            "floor us": (layers.weight_bytes + layers.kv_bytes(rows, tokens)) / bandwidth * 1e6,
            "layer us": layers.us(rows, tokens, None) if layers.fuses(rows) else apart_us,
            "apart us": apart_us,
            "products alone us": layers.us(rows, tokens, served, between=False),
            **{name: shape_text(shape) for name, shape in served.items()},
        }
        if every_shape:
            for name, (n, k) in layers.products.items():
                times_us = {shape: layers.us(rows, tokens, {**served, name: shape}) for shape in all_shapes(rows, n, k)}
                best = min(times_us, key=times_us.__getitem__)
                row[f"{name} best"] = f"{shape_text(best)}: {times_us[best] - apart_us:+.1f}"
                row[f"{name} all"] = {shape_text(shape): round(time, 2) for shape, time in times_us.items()}
        yield row


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser("layer", __doc__)
    parser.add_argument(
        "--tokens", type=int, default=320, metavar="T", help="of a context that a draft reads; default %(default)s"
    )
    args = parser.parse_args(argv)
    if ON_CPU or not is_hopper(torch.device("cuda")) or max(args.rows) > MAX_ROWS:
        parser.error(f"needs a Hopper GPU, and at most {MAX_ROWS} rows")
    bandwidth = copy_bandwidth()
    fmt = create_format(args.weights, group_size=args.group_size, device=torch.device("cuda"))
    layers = Layers(SHAPES[args.model], fmt)
    rows = list(measure(layers, args.rows, args.tokens, args.all_shapes, bandwidth))
    write_rows(args.out, rows, bandwidth=bandwidth)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
