"""Settings: ServerArgs are what the user wrote; what SGLang made of them is published to a process, by namespace."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce

from sglang.srt.arg_groups.arg_utils import namespace_of
from sglang.srt.arg_groups.model_override_base import model_config_of as model_config
from sglang.srt.runtime_context import get_context
from sglang.srt.server_args import ServerArgs

__all__ = ["model_config", "overridden", "published", "sampling_backend"]

SEAMS = """
arg_groups.model_override_base:model_config_of server_args
arg_groups.arg_utils:namespace_of cls
runtime_context:get_context
runtime_context:RuntimeContext.config_bag self name
runtime_context:_ConfigBag.override self
"""


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
    """In the block, what SGLang builds for ``view``, a copy of a ModelRunner, finds these settings."""
    with ExitStack() as scope:
        for name, value in fields.items():
            scope.enter_context(_bag(name).override(**{name: value}))
        yield
