"""Where Marlin's kernel is."""

from sglang.kernels.ops.quantization.gptq_marlin import _jit_gptq_marlin_module

__all__ = ["_jit_gptq_marlin_module"]
