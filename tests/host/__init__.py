import sys

from er_sglang.host.releases import adapter
from er_sglang.tools.serving import ON_CPU

if ON_CPU:
    sys.path[:0] = adapter("cpu_kernels").PATHS
