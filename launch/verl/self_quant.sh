# Rollouts with SELF_QUANT in veRL, whose environment holds a SGLang that we know. ER is a checkout of this repository. Once,
# on every node, with the Python of veRL's Ray actors:
#
#     pip install --no-deps ER && er-sglang autoload on
#
# Then, in veRL's checkout; its examples pass further words on to Hydra:
#
#     source ER/launch/verl/self_quant.sh
#     VERL_USE_UV=0 INFER_BACKEND=sglang bash examples/grpo_trainer/run_qwen3_4b_fsdp.sh "${SELF_QUANT[@]}"
#
# veRL hands engine_kwargs.sglang to SGLang's ServerArgs, and its weights in buckets: the copy follows before the first draft
# after the last of them. Written against veRL's sources of 2026; neither a step nor an update has been run.
_sglang=++actor_rollout_ref.rollout.engine_kwargs.sglang
SELF_QUANT=(
    "$_sglang.speculative_algorithm=SELF_QUANT"
    "$_sglang.speculative_num_steps=7"
    "$_sglang.speculative_adaptive_config=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/self_quant.json"
)
unset _sglang
