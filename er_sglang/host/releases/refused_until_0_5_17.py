"""Settings of ServerArgs that came or went, to be refused beside those of host/refusals.py."""

GONE = ()
FIELDS = (
    ("weight_cache_mode", ("off",), "leave --weight-cache-mode at off: the drafter is made of weights of this process"),
)  # fmt: skip
