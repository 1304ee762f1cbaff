"""Stands for SGLang's kernels where they cannot be loaded: any of them can be imported, none can be called."""

__version__ = "9.9.9"  # SGLang wants a recent one


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_, **__):
        raise NotImplementedError(f"sgl_kernel.{name} needs a GPU")

    return missing
