"""Settings: fields of ServerArgs, which SGLang fills in and reads all the time."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from sglang.srt.runtime_context import get_flags
from sglang.srt.server_args import get_global_server_args as published

__all__ = ["model_config", "overridden", "published", "sampling_backend"]


def model_config(server_args):
    return server_args.get_model_config()


def sampling_backend() -> str:
    return get_flags().sampling_backend


@contextmanager
def overridden(view, **fields) -> Iterator[None]:
    """``view``, a copy of a ModelRunner, gets ServerArgs of its own with these settings, for good."""
    view.server_args = copy.copy(view.server_args)
    for name, value in fields.items():
        setattr(view.server_args, name, value)
    yield
