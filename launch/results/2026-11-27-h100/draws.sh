#!/usr/bin/env bash
# What the simulator makes of the step times of the 7B and of Qwen3-8B: bash draws.sh > draws.txt
cd "$(dirname "$0")"
. ../simulate.sh
simulate_draws \
    "--profile 7b-long-tail/profile.json $tail_of" \
    "--profile 8b-fused-8-long-tail/profile.json $tail_of" \
    "--profile 7b-fused-8-rollout/profile.json $short" \
    "--profile 8b-fused-8-rollout/profile.json $short" \
    "--profile 8b-fused-8-32-long/profile.json $long"
