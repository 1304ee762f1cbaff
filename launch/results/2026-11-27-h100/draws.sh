#!/usr/bin/env bash
# What the simulator makes of the 7B's step times: bash draws.sh > draws.txt
cd "$(dirname "$0")"
simulate() {
    echo "\$ er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 $*"
    er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 "$@" 2>/dev/null | grep -E "^auto|^off"
}
tail_of="--profile 7b-long-tail/profile.json --requests 64 --lengths lognormal:400:1.2:8000"
short="--profile 7b-rollout/profile.json --requests 128 --lengths lognormal:200:0.8:1000"
echo "# the 1.5B's acceptance behind documents"
for what in "$tail_of" "$short"; do simulate $what --alpha .906 --windows 256:0.961,1024:0.978; done
echo "# other draws of the long tail, stated acceptance"
for seed in 0 1 2 3 4 5 6 7; do simulate $tail_of --alpha .93 --windows 128:0.961,256:0.987,512:0.998 --seed $seed; done
