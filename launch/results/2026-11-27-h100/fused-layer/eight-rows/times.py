"""Microseconds of a layer by rows and by how much room x may take: `GOOD="50000 90000" AHEAD=4 python times.py TAG MODELS...`."""

import os
import statistics
import sys

import torch

from er_sglang.bench.layer import Layers
from er_sglang.bench.shapes import SHAPES
from er_sglang.quantize import blocks, create_format, fused_layer

tag, *models = sys.argv[1:]
goods, aheads = (
    [int(x) for x in os.environ.get(name, default).split()] for name, default in (("GOOD", "50000"), ("AHEAD", "4"))
)
for model in models:
    fmt = create_format("int4", group_size=128, device=torch.device("cuda"))
    layers = Layers(SHAPES[model], fmt)
    for rows in (1, 4, 6, 8):
        us = {}
        if os.environ.get("APART"):
            us["apart"] = round(layers.us(rows, 320, layers.shapes(rows)), 2)
        for good in goods:
            for ahead in aheads:
                fused_layer.AHEAD_ROUNDS = ahead
                blocks.GOOD_X_BYTES = good
                blocks.choose_strips.cache_clear()
                strips = fmt._fused_layer._strips(layers._products(0), rows)
                fmt._fused_layer._scratch.clear()
                fmt._fused_layer.most_rows(layers._products(0))
                times = [layers.us(rows, 320, None) for _ in range(3)]
                us[(good, ahead, *strips)] = round(statistics.median(times), 2)
        print(tag, model, rows, us, flush=True)
    del layers
    torch.cuda.empty_cache()
