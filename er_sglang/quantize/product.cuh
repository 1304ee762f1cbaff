// What both int4 products share: their operands, checked, and what a finished sum becomes.
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/utils.cuh>

#include <tvm/ffi/container/tensor.h>

#include <cstdint>

#include "activation.cuh"
#include "int4.cuh"

namespace er_sglang {

constexpr int kUnitK = 128;  // K is shared out in pieces of it; holds one or more groups
constexpr int kMostSplits = 8;  // blocks of a cluster

struct Product {
  const void* x;          // [M, K], rows row_stride_x apart
  const void* codes;      // [K / 16, N / 64, 32] of 16 bytes
  const void* scales;     // [K / group, N]
  const uint32_t* zeros;  // [K / group, N / 8], asymmetric only
  const void* bias;       // [N] or null
  void* y;                // [M, N], or [M, N / 2] of a gated product
  int m, n, k;
  int row_stride_x;
  int splits;  // blocks of a cluster: they share K
  bool gated;  // y is silu(gate) * up: the product's first half is gate, the second up
};

// zeros and bias may be empty. gated: y is [M, N / 2]. Throws what is wrong with the operands.
template <typename T, bool kSymmetric, int kGroup>
Product checked_product(
    tvm::ffi::TensorView x,
    tvm::ffi::TensorView codes,
    tvm::ffi::TensorView scales,
    tvm::ffi::TensorView zeros,
    tvm::ffi::TensorView bias,
    tvm::ffi::TensorView y,
    bool gated,
    int64_t splits,
    int most_rows) {
  using namespace host;
  auto M = SymbolicSize{"M"}, N = SymbolicSize{"N"}, K = SymbolicSize{"K"}, stride = SymbolicSize{"row stride of x"};
  auto device = SymbolicDevice{};
  device.set_options<kDLCUDA>();
  TensorMatcher({M, K}).with_strides({stride, 1}).with_dtype<T>().with_device(device).verify(x);
  TensorMatcher({K.unwrap() / kGroup, N}).with_dtype<T>().with_device(device).verify(scales);
  TensorMatcher({K.unwrap() / kTileK, 2 * N.unwrap()}).with_dtype<int32_t>().with_device(device).verify(codes);
  const int m = M.unwrap(), n = N.unwrap(), k = K.unwrap();
  RuntimeCheck(1 <= m && m <= most_rows && n % kTileN == 0 && k % kUnitK == 0, "unsupported shape: m ", m, ", n ", n, ", k ", k);
  RuntimeCheck(!gated || n % (2 * kTileN) == 0, "gate and up are not of whole tiles: n ", n);
  TensorMatcher({M, gated ? n / 2 : n}).with_dtype<T>().with_device(device).verify(y);
  RuntimeCheck(stride.unwrap() % 8 == 0, "rows of x are not aligned to 16 bytes");
  RuntimeCheck(1 <= splits && splits <= kMostSplits && splits <= k / kUnitK, "splits is ", splits, " for k ", k);
  if constexpr (!kSymmetric) TensorMatcher({k / kGroup, n / 8}).with_dtype<int32_t>().with_device(device).verify(zeros);
  if (bias.size(0)) TensorMatcher({N}).with_dtype<T>().with_device(device).verify(bias);
  return {
      x.data_ptr(),
      codes.data_ptr(),
      scales.data_ptr(),
      kSymmetric ? nullptr : static_cast<const uint32_t*>(zeros.data_ptr()),
      bias.size(0) ? bias.data_ptr() : nullptr,
      y.data_ptr(),
      m,
      n,
      k,
      static_cast<int>(stride.unwrap()),
      static_cast<int>(splits),
      gated};
}

// Finished sums of neighbouring columns, from `column` on, as the product has them: with the bias, rounded. Of a gated product
// the second half's meet those of the first in `out`.
template <typename T, int kCount>
SGL_DEVICE void finish(T (&out)[kCount], const float (&sum)[kCount], const void* bias, int column, bool second_half) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const T rounded = static_cast<T>(bias ? sum[j] + static_cast<float>(static_cast<const T*>(bias)[column + j]) : sum[j]);
    out[j] = second_half ? silu_and_mul(out[j], rounded) : rounded;
  }
}

}  // namespace er_sglang
