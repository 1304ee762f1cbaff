"""Time the int4 products of a draft step: what serves, Marlin alone, and the floor of reading the weights once.

    python -m er_sglang.bench.gemm --model 14b --rows 1 8 16 32 48 64 96 128 --all-shapes

A product is timed as it runs in a draft chain: in a CUDA graph, over copies of its weight that together exceed the L2
cache, with a small kernel between two products that waits for one and that the next waits for (without it, programmatic
dependent launch would hide the end of one product behind the start of the next). The small kernel's own time is taken
off. Needs a GPU; our kernels, a Hopper GPU.
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from er_sglang.bench.shapes import SHAPES, heads
from er_sglang.bench.timing import L2_BYTES, copy_bandwidth, graph_us
from er_sglang.drafting.rescoring import rescore_
from er_sglang.quantize import Format, Packed, create_format
from er_sglang.quantize import blocks as shapes
from er_sglang.quantize.blocks import MAX_ROWS, SMALL_BATCH, Blocks, Wave, Waves
from er_sglang.tools.results import write_rows
from er_sglang.tools.serving import ON_CPU

DTYPE = torch.bfloat16


def products(shape: dict) -> dict[str, tuple[int, int]]:
    """(n, k) of a layer's fused Linears, and of lm_head, which a drafted token multiplies by once."""
    hidden, intermediate = shape["hidden_size"], shape["intermediate_size"]
    heads_q, heads_k, head_dim = heads(shape)
    return {
        "qkv": ((heads_q + 2 * heads_k) * head_dim, hidden),
        "o": (hidden, heads_q * head_dim),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "lm_head": (shape["vocab_size"], hidden),
    }


def between(y_MN: torch.Tensor, x_MK: torch.Tensor) -> None:
    """Stands for the norm or activation that turns a product into the next one's input: waits for y, writes x (as it
    was)."""
    x, y = x_MK.view(-1), y_MN.view(-1)
    count = min(len(x), len(y))
    torch.add(x[:count], y[:count], alpha=0.0, out=x[:count])


def all_shapes(m: int, n: int, k: int) -> Iterator[Blocks | Waves]:
    """Every way to share out a product of m rows by blocks that are alike, as our kernels have them and a
    multiprocessor's shared memory holds them."""
    if m <= SMALL_BATCH:
        for warps_n, warps_k in shapes.RESIDENT:
            for splits in shapes.SPLITS:
                blocks = Blocks(warps_n, warps_k, splits)
                if splits <= k // shapes.UNIT_K and shapes.shared_bytes(k, blocks) <= shapes.SHARED_BYTES:
                    yield blocks
    if m <= MAX_ROWS:
        for splits in range(1, min(shapes.MAX_SPLITS, k // shapes.UNIT_K) + 1):
            yield (Wave(-(-n // shapes.WGMMA_BLOCK_N), splits),)


def measure(
    name: str, n: int, k: int, fmt: Format, rows: Sequence[int], every_shape: bool, bandwidth: float
) -> Iterator[dict]:
    """A table row per number of rows; bandwidth in bytes per second."""
    device = torch.device("cuda")
    first = fmt.allocate(n, k, DTYPE, device)
    weight_NK = torch.randn(n, k, device=device, dtype=DTYPE) * 0.02
    fmt.refresh_(first, weight_NK)
    copies = [first] + [clone(first) for _ in range(4 * L2_BYTES // first.nbytes + 1)]
    marlin = copy.copy(fmt)  # without our kernels
    ours, marlin._on_hopper = fmt._hopper_gemm.get(DTYPE), False
    for m in rows:
        x_MK, y_MN = torch.randn(m, k, device=device, dtype=DTYPE), torch.zeros(m, n, device=device, dtype=DTYPE)
        between_us = graph_us(lambda i: between(y_MN, x_MK), len(copies))

        def product_us(product: Callable[[Packed], torch.Tensor]) -> float:
            return graph_us(lambda i: between(product(copies[i]), x_MK), len(copies)) - between_us

        def shaped(packed: Packed, shape: Blocks | Waves) -> torch.Tensor:
            ours(packed, x_MK, None, y_MN, shape)
            return y_MN

        chosen = ours.shape(m, first) if ours and m <= MAX_ROWS else None
        row = {
            "product": name,
            "n": n,
            "k": k,
            "rows": m,
            "floor us": first.nbytes / bandwidth * 1e6,
            "Marlin us": product_us(lambda packed: marlin.apply(packed, x_MK, None)),
            "served us": product_us(lambda packed: fmt.apply(packed, x_MK, None)),
            "by": shape_text(chosen) or "Marlin",
            "rescoring us": None,
        }
        if name == "lm_head":  # so flat that each class has its leader scored again, the most there can be
            logits_MN = fmt.apply(first, x_MK, None)
            row["rescoring us"] = graph_us(lambda _: rescore_(logits_MN, x_MK, weight_NK), 3)
        if every_shape and ours:
            times_us = {shape: product_us(lambda packed: shaped(packed, shape)) for shape in all_shapes(m, n, k)}
            best = min(times_us, key=times_us.__getitem__, default=None)
            row |= {"best us": times_us.get(best), "best by": shape_text(best)}
        yield row


def clone(packed: Packed) -> Packed:
    return dataclasses.replace(packed, **{name: tensor.clone() for name, tensor in packed.tensors().items()})


def shape_text(shape: Blocks | Waves | None) -> str | None:
    """As tables name it."""
    if isinstance(shape, Blocks):
        return "-".join(map(str, shape))
    return shape and "wgmma " + " + ".join(f"{columns} x {splits}" for columns, splits in shape)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser("gemm", __doc__)
    args = parser.parse_args(argv)
    if ON_CPU:
        parser.error("needs a GPU: on a CPU int4 products are plain torch")
    bandwidth = copy_bandwidth()
    fmt = create_format(args.weights, group_size=args.group_size, device=torch.device("cuda"))
    rows = []
    for name, (n, k) in tqdm(products(SHAPES[args.model]).items(), desc="products"):
        rows += measure(name, n, k, fmt, args.rows, args.all_shapes, bandwidth)
    write_rows(args.out, rows, bandwidth=bandwidth)
    return 0


def argument_parser(name: str, description: str) -> argparse.ArgumentParser:
    """Of a benchmark of int4 products, the module ``name``."""
    parser = argparse.ArgumentParser(
        prog=f"python -m er_sglang.bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="14b", choices=list(SHAPES), help="default %(default)s")
    parser.add_argument("--weights", default="int4", choices=("int4", "int4_asym"), help="default %(default)s")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128), help="default %(default)s")
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        default=[1, 8, 16, 32, 64, 128],
        metavar="M",
        help="requests; default 1 8 16 32 64 128",
    )
    parser.add_argument(
        "--all-shapes", action="store_true", help="time every shape of our kernels: is the best chosen?"
    )
    parser.add_argument("--out", type=Path, default=Path(f"{name}-results"), metavar="DIR", help="default %(default)s")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
