#!/usr/bin/env bash
# What the simulator makes of the step times of these servers: bash draws.sh > draws.txt
cd "$(dirname "$0")"
. ../../simulate.sh
rollouts=("--profile 8b/32-long/profile.json $long")
for model in 14b 7b 8b; do
    rollouts+=("--profile $model/long-tail/profile.json $tail_of" "--profile $model/rollout/profile.json $short")
done
simulate_draws "${rollouts[@]}"
