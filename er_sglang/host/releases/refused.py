"""Settings of ServerArgs that came or went, to be refused beside those of host/refusals.py."""

GONE = ("torchao_config",)
FIELDS = (
    ("attn_dp_size", (1,), "leave --attn-dp-size at 1: DP attention is not supported"),
    ("enable_watermark", (False,), "drop --enable-watermark: drafts are not sampled with it"),
    ("speculative_use_block_verification", (False,), "drop --speculative-use-block-verification: acceptance is exact without it"),
    ("speculative_draft_sink_size", (None,), "drop --speculative-draft-sink-size: drafts always read the first tokens"),
    ("startup_weight_load_mode", ("serial",), "leave --startup-weight-load-mode at serial: the drafter is made of loaded weights"),
    ("weight_cache_mode", ("off",), "leave --weight-cache-mode at off: the drafter is made of weights of this process"),
    ("enable_layernorm_sp", (False,), "drop --enable-layernorm-sp"),
    ("enable_kv_cache_sharding", (False,), "drop --enable-kv-cache-sharding"),
)  # fmt: skip
