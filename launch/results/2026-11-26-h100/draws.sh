#!/usr/bin/env bash
# What the simulator makes of measured step times: bash draws.sh > draws.txt
cd "$(dirname "$0")"
. ../simulate.sh
echo "# the 1.5B's acceptance behind documents"
for model in 14b 7b; do simulate --profile $model-long-tail/profile.json $tail_of --alpha .906 --windows 256:0.961,1024:0.978; done
simulate --profile 14b-rollout-boxes/profile.json $short --alpha .906 --windows 256:0.961,1024:0.978
echo "# other draws of the long tail, stated acceptance"
for model in 14b 7b; do
    for seed in 0 1 2 3 4 5 6 7; do
        simulate --profile $model-long-tail/profile.json $tail_of --alpha .93 --windows 256:0.987,512:0.998,1024:1 --seed $seed
    done
done
echo "# little acceptance"
simulate --profile 14b-rollout-boxes/profile.json $short --alpha .6 --windows 256:0.961,1024:0.978
simulate --profile 14b-long-tail/profile.json $tail_of --alpha .6 --windows 256:0.961,1024:0.978
