. .gpu-a/boot.sh > /dev/null 2>&1
D=/tmp/fp8; rm -rf $D; mkdir -p $D ~/.cache/tvm-ffi; tar xJf .gpu-fp8/tree.tar.xz -C $D; tar xJf .gpu-a/jit-kern.tar.xz -C ~/.cache/tvm-ffi
export PYTHONPATH=$D:$PYTHONPATH; L=$OUT/fp8refresh; mkdir -p $L; cd $D
timeout 80 python3 -m pytest tests/gpu/test_quantize.py -q -x -p no:cacheprovider -k "of_a_scaled_weight" > $L/scaled.log 2>&1; tail -3 $L/scaled.log | cut -c1-200
timeout 80 python3 - > $L/refresh.log 2>&1 <<P
import torch, tests.gpu.test_quantize as t
from er_sglang.quantize import create_format
a = torch.empty(2**31, dtype=torch.uint8, device="cuda"); b = torch.empty_like(a); b.copy_(a)
bandwidth = 2 * a.nbytes / t.best_of(5, lambda: b.copy_(a)); del a, b
fmt = create_format("int4", group_size=128, device=t.CUDA)
for model in ("7B", "14B"):
    for policy in ("bf16", "fp8 by channels", "fp8 by blocks"):
        t.test_refresh_time_and_memory(fmt, model, policy, bandwidth)
P
grep -a "refresh\|Error" $L/refresh.log | cut -c1-220
