"""Microseconds of a layer by rows, calls 6 to 8: `APART=1 AHEAD="(1, 2, 4)" ROWS="(1, 8)" python times.py TAG MODELS...`.

Calls 1 to 4 were by ../eight-rows/times.py with other rows, call 5 by this with settings that only paced.diff has.
"""

import ast
import os
import statistics
import sys

import torch

from er_sglang.bench.layer import Layers
from er_sglang.bench.shapes import SHAPES
from er_sglang.quantize import create_format, fused_layer


def us(layers: Layers, rows: int, shapes) -> float:
    return round(statistics.median(layers.us(rows, 320, shapes) for _ in range(3)), 2)


def main(tag: str, *models: str) -> None:
    for model in models:
        layers = Layers(SHAPES[model], create_format("int4", group_size=128, device=torch.device("cuda")))
        for rows in ast.literal_eval(os.environ.get("ROWS", "(1, 2, 4, 6, 8)")):
            found = {"apart": us(layers, rows, layers.shapes(rows))} if os.environ.get("APART") else {}
            found["fused"] = us(layers, rows, None)
            for ahead in ast.literal_eval(os.environ.get("AHEAD", "()")):
                fused_layer.AHEAD_ROUNDS = ahead * rows
                found[ahead] = us(layers, rows, None)
            fused_layer.AHEAD_ROUNDS = 4
            print(tag, model, rows, found, flush=True)
        del layers
        torch.cuda.empty_cache()


main(*sys.argv[1:])
