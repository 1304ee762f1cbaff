#!/usr/bin/env bash
# What 8 and 16 requests lacked: bash fused-8-cycles.sh > fused-8-cycles.txt
cd "$(dirname "$0")"
python ../best_cycles.py {14b,7b,8b}-fused-8:{8:1152:1.9,16:1152:1.75} {7b,8b}-fused-8-long-context:16:8128:1.9
