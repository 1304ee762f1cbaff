#!/usr/bin/env bash
# What the simulator makes of the step times measured with fused layers of up to 8 rows: bash fused-8-draws.sh > fused-8-draws.txt
simulate() {
    echo "\$ er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 $*"
    er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 "$@" 2>/dev/null | grep -E "^auto|^off"
}
cd "$(dirname "$0")"
predicted="--alpha .906 --windows 256:0.961,1024:0.978"
long_tail="--profile 8b-fused-8-long-tail/profile.json --requests 64 --lengths lognormal:400:1.2:8000"
short="--requests 128 --lengths lognormal:200:0.8:1000"
long="--profile 8b-fused-8-32-long/profile.json --requests 32 --lengths lognormal:2500:0.6:8192"
echo "# the 1.5B's acceptance behind documents"
simulate $long_tail $predicted
simulate --profile 8b-fused-8-rollout/profile.json $short $predicted
simulate --profile 7b-fused-8-rollout/profile.json $short $predicted
simulate $long $predicted
echo "# other draws, stated acceptance"
for seed in 0 1 2 3 4 5 6 7; do
    simulate $long_tail --alpha .93 --windows 256:0.987,512:0.998,1024:1 --seed $seed
    simulate $long --alpha .93 --windows 256:0.987,512:0.998,1024:1 --seed $seed
    for model in 7b 8b; do
        simulate --profile $model-fused-8-rollout/profile.json $short --alpha .93 --windows 128:0.961,256:0.987,512:0.998,1024:1 --seed $seed
    done
done
