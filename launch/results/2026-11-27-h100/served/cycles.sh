#!/usr/bin/env bash
# The best cycles of these servers: bash cycles.sh > cycles.txt
cd "$(dirname "$0")"
python ../../best_cycles.py \
    14b/decode:{1:1152:2.0,8:1152:1.9,16:1152:1.75,32:1152:1.5,64:1152:1.35,96:1152:1.25} \
    {7b,8b}/decode:{1:1152:2.0,8:1152:1.9,16:1152:1.75,32:1152:1.5,64:1152:1.3,96:1152:1.2} \
    14b/long-context:16:8128:2.0 {7b,8b}/long-context:16:8128:1.9
