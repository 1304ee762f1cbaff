"""A shadow of a module tree: some modules replaced, those that contain them copied, all others shared."""

from __future__ import annotations

import types
from collections.abc import Callable

from torch import nn

from er_sglang.host.releases import adapter

_layers = adapter("layers")


def shadow(root: nn.Module, convert: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """``root`` with every module for which ``convert`` returns one replaced; modules without any are shared."""
    replaced: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module in replaced:
            return replaced[module]
        twin = convert(module)
        if twin is None:
            children = {name: visit(child) for name, child in module.named_children()}
            if all(children[name] is child for name, child in module.named_children()):
                twin = module
            else:
                twin = shallow_copy(module)
                twin._modules.update(children)
        replaced[module] = twin
        return twin

    twin = visit(root)
    for original, copied in replaced.items():
        if copied is not original:
            _rebind(copied, replaced)
    return twin


def shallow_copy(module: nn.Module) -> nn.Module:
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[registry] = dict(module.__dict__[registry])
    return twin


def _rebind(module: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """What a module holds besides its children follows the replaced ones too: bound methods (MultiPlatformOp) and
    what `releases/layers.py` knows."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            module.__dict__[name] = types.MethodType(value.__func__, replaced.get(value.__self__, value.__self__))
        elif (followed := _layers.followed(value, replaced)) is not None:
            module.__dict__[name] = followed
