"""int4 on CUDA, in Marlin's layout, packed by our fused kernel: our own GEMMs for up to 128 rows on Hopper, else
SGLang's Marlin.

`apply` calls the JIT module itself: SGLang's wrapper allocates its reduction buffer and four empty tensors per call.
Symmetric weights use Marlin's uint4b8 kernels, asymmetric ones uint4 with zero points; one JIT module per
activation dtype holds both, for groups of 32, 64 and 128. It takes minutes to compile: on Hopper it is loaded by the
first product of more rows than our own take.

When several thread blocks share an output tile, Marlin adds their parts one after another under a lock, in float32
(`use_fp32_reduce`). Its alternative, atomic adds in the output's dtype, applies only to N <= 2048 and depends on
the order of arrival; we do without it, so that a replayed graph and an eager call agree bit for bit.
"""

import torch
from sgl_kernel.scalar_type import scalar_types

from er_sglang.quantize import fused_layer, marlin_layout, rtn
from er_sglang.quantize.base import Format, LayerNorms, LayerProducts, Packed
from er_sglang.quantize.blocks import MAX_ROWS
from er_sglang.quantize.hopper import HopperGemm, is_hopper
from er_sglang.quantize.kernels import refresh_int4_marlin_
from er_sglang.quantize.modules import marlin_module
from er_sglang.quantize.scaled import ScaledWeight

GROUP_SIZES = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)
# Largest output tile of a thread block, in rows (tokens) and columns.
_MAX_TILE_M = 64
_MAX_TILE_N = 256


class MarlinInt4(Format):
    """Codes int32 [K/16, 2N], scales [G, N] in the weight's dtype, zeros int32 [G, N/8]: see `marlin_layout`."""

    def __init__(self, *, group_size: int, symmetric: bool, device: torch.device) -> None:
        if group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {group_size} is not supported on CUDA: use 128 (or 64 or 32)")
        self.group_size = group_size
        self.symmetric = symmetric
        self._type_id = (scalar_types.uint4b8 if symmetric else scalar_types.uint4).id
        self._hopper_gemm = {}  # by activation dtype, loaded by allocate(); empty on other chips
        self._on_hopper = is_hopper(device)
        self._fused_layer: fused_layer.FusedLayer | None = None  # loaded by fused_rows()
        sm_count = torch.cuda.get_device_properties(device).multi_processor_count
        self._locks = torch.zeros(sm_count, dtype=torch.int32, device=device)
        self._partial_sums = torch.empty(sm_count * _MAX_TILE_M * _MAX_TILE_N, dtype=torch.float32, device=device)
        self._none = torch.empty(0, dtype=torch.int32, device=device)

    def unsupported(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        if dtype not in DTYPES:
            return f"its dtype is {dtype}, Marlin computes in bfloat16 or float16"
        if n % marlin_layout.TILE_N:
            return f"its {n} output features are not a multiple of {marlin_layout.TILE_N}"
        if k % 128:
            return f"its {k} input features are not a multiple of 128"
        if k == self.group_size:
            return f"its {k} input features are a single group, Marlin needs two or more"
        return None

    def allocate(self, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Packed:
        if not self._on_hopper:
            marlin_module(dtype)
        elif dtype not in self._hopper_gemm:
            self._hopper_gemm[dtype] = HopperGemm(
                dtype=dtype, symmetric=self.symmetric, group_size=self.group_size, device=device
            )
        groups = k // self.group_size
        return Packed(
            n=n,
            k=k,
            dtype=dtype,
            codes=torch.empty(k // 16, 2 * n, dtype=torch.int32, device=device),
            scales=torch.empty(groups, n, dtype=dtype, device=device),
            zeros=None if self.symmetric else torch.empty(groups, n // 8, dtype=torch.int32, device=device),
        )

    def refresh_(self, packed: Packed, weight_NK: torch.Tensor | ScaledWeight) -> None:
        refresh_int4_marlin_(weight_NK, packed.codes, packed.scales, packed.zeros, group_size=self.group_size)

    def apply(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        if self._on_hopper and len(x_MK) <= MAX_ROWS:
            return self._hopper_gemm[packed.dtype].apply(packed, x_MK, bias_N, gated=False)
        y_MN = x_MK.new_empty(len(x_MK), packed.n)
        marlin_module(packed.dtype).gptq_marlin_gemm(
            x_MK,
            packed.codes,
            packed.scales,
            self._none,  # global scale, of fp4
            self._none if self.symmetric else packed.zeros,
            self._none,  # activation order: group index
            self._none,  # activation order: permutation
            y_MN,
            self._partial_sums,
            self._none,  # activation order: permuted activations
            self._locks,
            self._type_id,
            True,  # is_k_full
            False,  # use_atomic_add
            True,  # use_fp32_reduce
            False,  # is_zp_float
        )
        return y_MN if bias_N is None else y_MN.add_(bias_N)

    def gates(self, n: int) -> bool:
        return self._on_hopper and n % (2 * marlin_layout.TILE_N) == 0

    def apply_gated(self, packed: Packed, x_MK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
        if self._on_hopper and len(x_MK) <= MAX_ROWS:
            return self._hopper_gemm[packed.dtype].apply(packed, x_MK, bias_N, gated=True)
        return super().apply_gated(packed, x_MK, bias_N)

    def fused_rows(self, products: LayerProducts) -> int:
        if not self._on_hopper or not self.symmetric or self.group_size != fused_layer.GROUP_SIZE:
            return 0
        if any(packed.dtype != fused_layer.DTYPE for packed in products):
            return 0
        if self._fused_layer is None:
            self._fused_layer = fused_layer.FusedLayer(device=products.o.codes.device)
        return self._fused_layer.most_rows(products)

    def apply_layer(
        self,
        products: LayerProducts,
        x_MK: torch.Tensor,
        residual_MH: torch.Tensor,
        norms: LayerNorms,
        bias_N: torch.Tensor | None,
    ) -> torch.Tensor:
        return self._fused_layer(products, x_MK, residual_MH, norms, bias_N)

    def dequantize(self, packed: Packed) -> torch.Tensor:
        zeros_NG = None if self.symmetric else marlin_layout.unpack_zeros(packed.zeros)
        codes_NK = marlin_layout.unpack_codes(packed.codes)
        return rtn.dequantize_int4(codes_NK, marlin_layout.unpack_scales(packed.scales), zeros_NG)
