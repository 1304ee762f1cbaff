"""SGLang's kernels on a machine without a GPU: SGLang does not ask for them."""

# Folders to put in front of the path for imports.
PATHS = []
