"""Timing kernels on a GPU: what they take in a CUDA graph, and the bandwidth that bounds them."""

from collections.abc import Callable

import torch

L2_BYTES = 50 * 2**20  # of an H100 or H200
REPLAYS = 3


def graph_us(run: Callable[[int], None], copies: int) -> float:
    """Microseconds of ``run(i)``, i of ``copies`` in turn; the best of REPLAYS."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(2 * copies):
            run(i % copies)
    graph.replay()
    times_us = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_us.append(start.elapsed_time(end) * 1e3 / (2 * copies))
    return min(times_us)


def copy_bandwidth() -> float:
    """Bytes per second, reads and writes together, of a device-to-device copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_us(lambda _: target.copy_(source), 1) / 1e6)
