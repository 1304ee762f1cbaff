"""Triton kernels run in its interpreter here: unit tests need no GPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"
