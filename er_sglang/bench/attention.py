"""Time attention of a drafted token: ours, FlashAttention-3 as SGLang calls it, and the floor of reading the keys and
values once.

    python -m er_sglang.bench.attention --model 14b --points 1x1336 16x320 64x576 128x576 16x8192

A point is REQUESTSxTOKENS. Each is timed in a CUDA graph over the caches of several layers, which together exceed the L2
cache. Needs a Hopper GPU and SGLang.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from er_sglang.bench.shapes import SHAPES, heads
from er_sglang.bench.timing import L2_BYTES, copy_bandwidth, graph_us
from er_sglang.tools.results import write_rows
from er_sglang.tools.serving import ON_CPU

POINTS = ["1x1336", "8x1336", "16x320", "64x320", "128x320", "16x576", "64x576", "128x576", "64x1336", "16x8192"]
DTYPE = torch.bfloat16


def measure(shape: dict, points: list[str], bandwidth: float) -> Iterator[dict]:
    """A table row per point; bandwidth in bytes per second."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache, get_scheduler_metadata

    from er_sglang.drafting import attention

    heads_q, heads_k, head_dim = heads(shape)
    device, scale = torch.device("cuda"), head_dim**-0.5
    for point in tqdm(points, desc="points"):
        batch, tokens = map(int, point.split("x"))
        kv_bytes = 2 * batch * tokens * heads_k * head_dim * DTYPE.itemsize
        layers = 2 + 4 * L2_BYTES // kv_bytes
        k, v = torch.randn(2, layers, batch * tokens, heads_k, head_dim, dtype=DTYPE, device=device)
        q = torch.randn(batch, heads_q, head_dim, dtype=DTYPE, device=device)
        req_to_token = torch.arange(batch * tokens, dtype=torch.int32, device=device).view(batch, tokens)
        rows, lengths = torch.arange(batch, device=device), torch.full((batch,), tokens, device=device)
        scratch = attention.scratch(batch, heads_k, head_dim, device)
        ours_us = graph_us(
            lambda i: attention.attend(q, k[i], v[i], req_to_token, rows, lengths, *scratch, scale), layers
        )
        lengths = lengths.int()
        cu_seqlens_q = torch.arange(batch + 1, dtype=torch.int32, device=device)
        planned = get_scheduler_metadata(
            batch_size=batch,
            max_seqlen_q=1,
            max_seqlen_k=tokens,
            num_heads=heads_q,
            num_heads_k=heads_k,
            headdim=head_dim,
            cache_seqlens=lengths,
            qkv_dtype=DTYPE,
            cu_seqlens_q=cu_seqlens_q,
            page_size=1,
            causal=True,
        )
        fa3_us = graph_us(
            lambda i: flash_attn_with_kvcache(
                q=q,
                k_cache=k[i].unsqueeze(1),
                v_cache=v[i].unsqueeze(1),
                page_table=req_to_token,
                cache_seqlens=lengths,
                cu_seqlens_q=cu_seqlens_q,
                max_seqlen_q=1,
                softmax_scale=scale,
                causal=True,
                scheduler_metadata=planned,
            ),
            layers,
        )
        yield {
            "requests": batch,
            "tokens": tokens,
            "floor us": kv_bytes / bandwidth * 1e6,
            "FA3 us": fa3_us,
            "ours us": ours_us,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m er_sglang.bench.attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="14b", choices=list(SHAPES), help="default %(default)s")
    parser.add_argument("--points", nargs="+", default=POINTS, metavar="BxT", help=f"default {' '.join(POINTS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("attention-results"), metavar="DIR", help="default %(default)s"
    )
    args = parser.parse_args(argv)
    if ON_CPU:
        parser.error("needs a Hopper GPU")
    bandwidth = copy_bandwidth()
    rows = list(measure(SHAPES[args.model], args.points, bandwidth))
    write_rows(args.out, rows, bandwidth=bandwidth)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
