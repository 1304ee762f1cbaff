"""Settings of ServerArgs that came or went, to be refused beside those of host/refusals.py."""

GONE = ("torchao_config",)
FIELDS = (
    ("startup_weight_load_mode", ("serial",), "leave --startup-weight-load-mode at serial: the drafter is made of loaded weights"),
    ("weight_cache_mode", ("off",), "leave --weight-cache-mode at off: the drafter is made of weights of this process"),
    ("enable_layernorm_sp", (False,), "drop --enable-layernorm-sp"),
)  # fmt: skip
