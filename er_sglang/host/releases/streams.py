"""Streams: nothing of what SGLang did wrong with several tokens a step is left."""

SCHEDULER_HOOKS = {}
FRONT_END_HOOKS = {}
