#!/usr/bin/env bash
# What the simulator makes of the step times of these servers: bash draws.sh > draws.txt
cd "$(dirname "$0")"
. ../../simulate.sh
tail_of="--requests 64 --lengths lognormal:400:1.2:8000"
short="--requests 128 --lengths lognormal:200:0.8:1000"
rollouts=("--profile 8b/32-long/profile.json --requests 32 --lengths lognormal:2500:0.6:8192")
for model in 14b 7b 8b; do
    rollouts+=("--profile $model/long-tail/profile.json $tail_of" "--profile $model/rollout/profile.json $short")
done
echo "# the 1.5B's acceptance behind documents"
for what in "${rollouts[@]}"; do simulate $what --alpha .906 --windows 256:0.961,1024:0.978; done
echo "# other draws of lengths, stated acceptance"
for what in "${rollouts[@]}"; do
    for seed in 0 1 2 3 4 5 6 7; do simulate $what --alpha .93 --windows 128:0.961,256:0.987,512:0.998 --seed $seed; done
done
