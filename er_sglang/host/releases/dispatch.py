"""Which of its forwards an operator of many platforms computes: it looks when it is called first."""

from collections.abc import Callable

from sglang.kernels.fused_op import BaseFusedOp

SEAMS = """
sglang.kernels.fused_op:BaseFusedOp._resolve_forward_method self
"""


def forward_method(op: BaseFusedOp) -> Callable:
    return op._forward_method or op._resolve_forward_method()
