"""Unit tests need no GPU, and their outcome depends neither on the machine's speed nor on chance."""

import os

import torch
from hypothesis import HealthCheck, settings

os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run in its interpreter
torch.set_num_threads(1)  # tests run in parallel processes instead, and wait for each other's threads otherwise

# The same examples in every run, however long one of them takes.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")
