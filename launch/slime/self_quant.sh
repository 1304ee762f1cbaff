# Rollouts with SELF_QUANT. Add one line to a slime launch script, after its SGLANG_ARGS and before `ray job submit`:
#
#     source /root/self_quant/self_quant.sh
#
# The image of launch/slime/Dockerfile has it there, with the settings beside it; on several nodes, every node's image.
SGLANG_ARGS+=(
   --sglang-speculative-algorithm SELF_QUANT
   --sglang-speculative-num-steps 7
   --sglang-speculative-adaptive-config "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/self_quant.json"
   --custom-rollout-log-function-path er_sglang.integrations.slime.log_rollout
)
