"""SGLang's kernels on a machine without a GPU: they cannot be loaded there, and SGLang imports them all the same."""

from pathlib import Path

# Folders to put in front of the path for imports.
PATHS = [str(Path(__file__).with_name("sgl_kernel_on_cpu"))]
