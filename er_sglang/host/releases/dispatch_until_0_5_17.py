"""Which of its forwards an operator of many platforms computes."""

from collections.abc import Callable

from sglang.srt.layers.utils.multi_platform import MultiPlatformOp

SEAMS = """
layers.utils.multi_platform:MultiPlatformOp.dispatch_forward self
"""


def forward_method(op: MultiPlatformOp) -> Callable:
    return op._forward_method
