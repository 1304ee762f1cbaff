"""Microseconds of choosing 1024 tokens by their scores, by our two kernels, and of torch.topk of the same scores: `python choice.py`"""

import torch

from er_sglang.bench.timing import graph_us
from er_sglang.drafting.choice import choose

print(torch.cuda.get_device_name())
print("| requests | tokens of context | choose, us | topk, us |\n|---:|---:|---:|---:|")
for batch in (1, 16, 64):
    for columns in (1152, 8192, 32768):
        scores = torch.rand(batch, columns, device="cuda").pow_(8)
        lengths = torch.full((batch,), columns, device="cuda")
        rows = torch.arange(batch, device="cuda")
        tokens = torch.zeros(batch, 1024, dtype=torch.int64, device="cuda")
        until = torch.zeros(batch, dtype=torch.int64, device="cuda")
        ours = graph_us(lambda _: choose(scores, lengths, rows, 64, 64, 1, tokens, until), 20)
        topk = graph_us(lambda _: scores.topk(1024, 1), 20)
        print(f"| {batch} | {columns} | {ours:.1f} | {topk:.1f} |", flush=True)
