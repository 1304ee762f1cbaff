"""Where a launch's microseconds are: `python stamps.py MODELS...`, with er_sglang as stamps.diff makes it."""

import sys

import torch

from er_sglang.bench.layer import Layers
from er_sglang.bench.shapes import SHAPES
from er_sglang.quantize import create_format

CYCLES_A_US = 1755
for model in sys.argv[1:]:
    fmt = create_format("int4", group_size=128, device=torch.device("cuda"))
    layers = Layers(SHAPES[model], fmt)
    for rows in (1, 4, 8):
        us = layers.us(rows, 320, None)
        stamps = fmt._fused_layer._launch[64:].view(132, 32)[:, :26].long()
        at = ((stamps - stamps[:, :1]) % 2**32).double() / CYCLES_A_US
        strips = fmt._fused_layer._strips(layers._products(0), rows)
        print(f"{model} {rows} rows {us:.2f} us {strips}; start to wait {at[:, 1].mean():.2f}")
        for i, name in enumerate(("o", "gate_up", "down", "qkv")):
            spans = at[:, 2 + 6 * i : 8 + 6 * i] - at[:, 1 + 6 * i : 7 + 6 * i]
            parts = zip(("x", "mult", "sync", "send", "finish", "sync"), spans.T)
            print(f"  {name:8}", *(f"{part} {t.mean():6.2f} ({t.min():5.2f}-{t.max():5.2f})" for part, t in parts))
    del layers
