"""A paused scheduler."""

# What a pause leaves in it.
STATE = ("_engine_paused",)
