# For the draws.sh of a folder, which sources it: a rollout's time, plainly and with `auto`, by measured step times.
simulate() {
    echo "\$ er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 $*"
    er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 "$@" 2>/dev/null | grep -E "^auto|^off"
}
tail_of="--requests 64 --lengths lognormal:400:1.2:8000"
short="--requests 128 --lengths lognormal:200:0.8:1000"
long="--requests 32 --lengths lognormal:2500:0.6:8192"

# Of rollouts, each "--profile FILE" with one of the above: with the 1.5B's acceptance, and of eight draws with the stated.
simulate_draws() {
    echo "# the 1.5B's acceptance behind documents"
    for what in "$@"; do simulate $what --alpha .906 --windows 256:0.961,1024:0.978; done
    echo "# other draws of lengths, stated acceptance"
    for what in "$@"; do
        for seed in 0 1 2 3 4 5 6 7; do simulate $what --alpha .93 --windows 128:0.961,256:0.987,512:0.998 --seed $seed; done
    done
}
