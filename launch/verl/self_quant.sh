# Rollouts with SELF_QUANT in veRL 0.9. ER is a checkout of this repository, at the same path on every node. Once, on every
# node, with the Python of veRL's Ray actors:
#
#     pip install sglang==0.5.15.post1                  # or 0.5.17, for the 0.5.12 that veRL asks for
#     pip install --no-deps ER && er-sglang autoload on
#
# Then, in veRL's checkout; its examples pass further words on to Hydra, and VERL_USE_UV=0 keeps them to that Python:
#
#     source ER/launch/verl/self_quant.sh
#     VERL_USE_UV=0 INFER_BACKEND=sglang bash examples/grpo_trainer/run_qwen3_4b_fsdp.sh "${SELF_QUANT[@]}"
#
# veRL gives speculation to SGLang, and counts its drafts (rollout/spec_accept_length, rollout/spec_accept_rate), by the mtp
# settings of its rollouts; those of its training, in model.mtp, stay off. The rate is a mean of one ratio a sample, in
# which a sample that was never drafted for counts as zero. rollout.gpu_memory_utilization has to hold the int4 copy, too.
#
# /metrics shows a server's drafts, with rollout.prometheus.enable=True; veRL's /server_info answers 500 on these releases.
#
# Ray hands a running cluster none of your variables: to set one on every worker, add a word such as
#     "++ray_kwargs.ray_init.runtime_env.env_vars.ER_SGLANG_CACHE=/shared/er_sglang"
_rollout=actor_rollout_ref.rollout
_mtp=_target_:verl.workers.config.MtpConfig,enable:True,enable_rollout:True
_mtp+=,speculative_algorithm:SELF_QUANT,speculative_num_steps:7,speculative_eagle_topk:1,speculative_num_draft_tokens:8
SELF_QUANT=(
    "$_rollout.mtp={$_mtp}"
    "++$_rollout.engine_kwargs.sglang.speculative_adaptive_config=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/self_quant.json"
)
unset _rollout _mtp
