"""How SGLang compiles kernels at run time."""

from sglang.kernels.jit.utils import cache_once, load_jit, make_cpp_args, override_jit_cuda_arch

__all__ = ["cache_once", "load_jit", "make_cpp_args", "override_jit_cuda_arch"]
