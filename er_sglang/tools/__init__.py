"""The commands of ``er-sglang``."""
