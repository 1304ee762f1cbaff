# For the draws.sh of a folder, which sources it: a rollout's time, plainly and with `auto`, by measured step times.
simulate() {
    echo "\$ er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 $*"
    er-sglang simulate --modes off,auto --prompt-tokens 128 --rollouts 1 "$@" 2>/dev/null | grep -E "^auto|^off"
}
