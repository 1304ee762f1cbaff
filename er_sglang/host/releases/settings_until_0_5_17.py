"""Settings: published to a process by namespace, but some of SGLang still reads the ServerArgs of its ModelRunner."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce

from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs

SEAMS = """
arg_groups.arg_utils:namespace_of cls
runtime_context:get_context
runtime_context:RuntimeContext.config_bag self name
runtime_context:_ConfigBag.override self
server_args:ServerArgs.get_model_config self
"""


def model_config(server_args):
    return server_args.get_model_config()


class _Published:
    """Fields of ServerArgs by name, as they are now."""

    def __getattr__(self, name: str):
        return getattr(_bag(name), name)


def _bag(name: str):
    top, *below = namespace_of(ServerArgs)[name].split(".")
    return reduce(getattr, below, get_context().config_bag(top))


def published() -> _Published:
    """The settings of this scheduler."""
    return _Published()


def sampling_backend() -> str:
    return published().sampling_backend


@contextmanager
def overridden(view, **fields) -> Iterator[None]:
    """In the block, what SGLang builds for ``view``, a copy of a ModelRunner, finds these settings; and the view has
    ServerArgs of its own with them, for good."""
    view.server_args = copy.copy(view.server_args)
    with ExitStack() as scope:
        for name, value in fields.items():
            object.__setattr__(view.server_args, name, value)  # which SGLang wants to be read only
            scope.enter_context(_bag(name).override(**{name: value}))
        yield
