// What a drafted token does between its products: residual + RMSNorm, silu(gate) * up, norms of heads + RoPE + KV store.
// Hopper only.
//
// They move few bytes; what they cost is the time between two products. So each lets the kernel after it start at once
// (programmatic dependent launch): the next product is resident and has requested its first weights by the time its x is
// there. SGLang's kernels do the same work, but let go at their end or not at all.
//
// Early starts are safe because every kernel here, and every product, waits (griddepcontrol.wait) before it touches
// anything that the chain writes, and ends only after that. The wait returns when the kernel before it has ended and its
// writes are visible; that one had ended its own wait; so all kernels before it have ended, however early they let go. What
// is read before the wait are weights, positions, slots and the table of cosines: no kernel of the chain writes them, and each
// token begins with an ordinary kernel (the embedding), which starts after whatever wrote them has ended. An ordinary kernel,
// launched without the attribute, starts when the one before it has ended.
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/utils.cuh>

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <type_traits>

#include "../quantize/activation.cuh"

namespace er_sglang {

constexpr int kWidth = 8;  // elements in 16 bytes

template <typename T>
struct alignas(16) Vector {
  T at[kWidth];
};

template <typename T>
SGL_DEVICE Vector<T> load(const void* base, int64_t index) {
  return static_cast<const Vector<T>*>(base)[index];
}

template <typename T>
SGL_DEVICE void store(void* base, int64_t index, const Vector<T>& v) {
  static_cast<Vector<T>*>(base)[index] = v;
}

SGL_DEVICE float sum_over_warp(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
  return v;
}

// residual += x, rounded; y = residual * rsqrt(mean(residual^2) + eps) * weight, of the residual before rounding.
// Without a residual, of x. A block is a row, a thread a vector of it. The order of sums is flashinfer's.
template <typename T, bool kAdd>
__global__ void rms_norm_kernel(const T* x, T* residual, const T* weight, T* y, int hidden, float eps) {
  __shared__ float parts[32];
  device::PDLTriggerSecondary<true>();
  const bool active = threadIdx.x < hidden / kWidth;
  const int64_t index = int64_t(blockIdx.x) * (hidden / kWidth) + threadIdx.x;
  Vector<T> w;
  if (active) w = load<T>(weight, threadIdx.x);
  device::PDLWaitPrimary<true>();
  float v[kWidth];
  float sum = 0;
  if (active) {
    const auto a = load<T>(x, index);
    Vector<T> r;
    if constexpr (kAdd) r = load<T>(residual, index);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      v[i] = static_cast<float>(a.at[i]);
      if constexpr (kAdd) v[i] += static_cast<float>(r.at[i]), r.at[i] = static_cast<T>(v[i]);
      sum += v[i] * v[i];
    }
    if constexpr (kAdd) store(residual, index, r);
  }
  sum = sum_over_warp(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = sum_over_warp(threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0.f);
  const float scale = rsqrtf(__fdividef(sum, static_cast<float>(hidden)) + eps);
  if (active) {
    Vector<T> out;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out.at[i] = static_cast<T>(v[i] * scale * static_cast<float>(w.at[i]));
    store(y, index, out);
  }
}

// y = silu(gate) * up; a row of x is gate and up, `width` vectors each.
template <typename T>
__global__ void silu_and_mul_kernel(const T* x, T* y, int width) {
  device::PDLTriggerSecondary<true>();
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  device::PDLWaitPrimary<true>();
  if (column >= width) return;
  const int64_t row = blockIdx.y;
  const auto gate = load<T>(x, 2 * row * width + column), up = load<T>(x, (2 * row + 1) * width + column);
  Vector<T> out;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) out.at[i] = silu_and_mul(gate.at[i], up.at[i]);
  store(y, row * width + column, out);
}

struct RopeStore {
  const void* q;  // [tokens, heads_q, head_dim]
  const void* k;  // [tokens, heads_k, head_dim], stored rotated
  const void* v;  // [tokens, heads_k, head_dim], stored
  void* q_out;    // [tokens, heads_q, head_dim], rotated
  void* k_cache;  // [slots, heads_k, head_dim]
  void* v_cache;
  const void* q_weight;  // [head_dim]: heads are normed before they are rotated; or null
  const void* k_weight;
  const float* cos_sin;  // [positions, head_dim]: cosines, then sines
  const int64_t* positions;
  const int64_t* slots;
  int64_t stride_q, stride_k, stride_v;  // between tokens, in elements
  int heads_q, heads_k;
  float eps;
};

// Halves of a head are rotated against each other (NeoX). A thread takes a vector of each half.
template <typename T, int kHeadDim>
__global__ void rope_store_kernel(const __grid_constant__ RopeStore p) {
  constexpr int kThreads = kHeadDim / 2 / kWidth;  // of a head
  device::PDLTriggerSecondary<true>();
  const int head = (blockIdx.x * blockDim.x + threadIdx.x) / kThreads, lane = threadIdx.x % kThreads;
  const int64_t token = blockIdx.y;
  const bool is_q = head < p.heads_q, is_v = head >= p.heads_q + p.heads_k;
  if (head >= p.heads_q + 2 * p.heads_k) return;
  const int kv_head = head - p.heads_q - (is_v ? p.heads_k : 0);
  const int64_t cached = (p.slots[token] * p.heads_k + kv_head) * kHeadDim;
  const float* table = p.cos_sin + p.positions[token] * kHeadDim + lane * kWidth;
  float4 cos[kWidth / 4], sin[kWidth / 4];
#pragma unroll
  for (int i = 0; i < kWidth / 4; ++i) {
    cos[i] = reinterpret_cast<const float4*>(table)[i];
    sin[i] = reinterpret_cast<const float4*>(table + kHeadDim / 2)[i];
  }
  const void* weight = is_q ? p.q_weight : p.k_weight;
  Vector<T> weight_x, weight_y;
  if (weight) weight_x = load<T>(weight, lane), weight_y = load<T>(weight, lane + kThreads);
  device::PDLWaitPrimary<true>();

  const T* from = is_q ? static_cast<const T*>(p.q) + token * p.stride_q + head * kHeadDim
                       : static_cast<const T*>(is_v ? p.v : p.k) + token * (is_v ? p.stride_v : p.stride_k) + kv_head * kHeadDim;
  T* to = is_q ? static_cast<T*>(p.q_out) + (token * p.heads_q + head) * kHeadDim
               : static_cast<T*>(is_v ? p.v_cache : p.k_cache) + cached;
  auto x = load<T>(from, lane), y = load<T>(from, lane + kThreads);
  if (!is_v && weight) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float x_i = static_cast<float>(x.at[i]), y_i = static_cast<float>(y.at[i]);
      sum += x_i * x_i + y_i * y_i;
    }
    const unsigned head_lanes = ((1u << kThreads) - 1) << (threadIdx.x % 32 / kThreads * kThreads);
#pragma unroll
    for (int offset = kThreads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(head_lanes, sum, offset);
    const float scale = rsqrtf(sum / kHeadDim + p.eps);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x.at[i] = static_cast<T>(static_cast<float>(x.at[i]) * scale * static_cast<float>(weight_x.at[i]));
      y.at[i] = static_cast<T>(static_cast<float>(y.at[i]) * scale * static_cast<float>(weight_y.at[i]));
    }
  }
  if (!is_v) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float c = reinterpret_cast<const float*>(cos)[i], s = reinterpret_cast<const float*>(sin)[i];
      const float x_i = static_cast<float>(x.at[i]), y_i = static_cast<float>(y.at[i]);
      x.at[i] = static_cast<T>(x_i * c - y_i * s);
      y.at[i] = static_cast<T>(x_i * s + y_i * c);
    }
  }
  store(to, lane, x);
  store(to, lane + kThreads, y);
}

template <typename T>
struct SmallKernels {
  static constexpr int kBlock = 256;

  template <typename... Arguments>
  static void launch(void (*kernel)(Arguments...), dim3 blocks, int threads, DLDevice device, std::type_identity_t<Arguments>... arguments) {
    host::LaunchKernel(blocks, threads, device).enable_pdl()(kernel, arguments...);
  }

  // residual may be empty: then it is not added. y may be x.
  static void rms_norm(
      tvm::ffi::TensorView x,
      tvm::ffi::TensorView residual,
      tvm::ffi::TensorView weight,
      tvm::ffi::TensorView y,
      double eps) {
    using namespace host;
    auto M = SymbolicSize{"M"}, K = SymbolicSize{"K"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({M, K}).with_dtype<T>().with_device(device).verify(x).verify(y);
    TensorMatcher({K}).with_dtype<T>().with_device(device).verify(weight);
    const bool add = residual.size(0);
    if (add) TensorMatcher({M, K}).with_dtype<T>().with_device(device).verify(residual);
    const int hidden = K.unwrap();
    RuntimeCheck(hidden % kWidth == 0 && hidden <= 1024 * kWidth, "unsupported hidden size ", hidden);
    launch(
        add ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>,
        M.unwrap(),
        div_ceil(hidden / kWidth, 32) * 32,
        device.unwrap(),
        static_cast<const T*>(x.data_ptr()),
        static_cast<T*>(residual.data_ptr()),
        static_cast<const T*>(weight.data_ptr()),
        static_cast<T*>(y.data_ptr()),
        hidden,
        eps);
  }

  static void silu_and_mul(tvm::ffi::TensorView x, tvm::ffi::TensorView y) {
    using namespace host;
    auto M = SymbolicSize{"M"}, N = SymbolicSize{"N"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({M, N}).with_dtype<T>().with_device(device).verify(y);
    TensorMatcher({M, 2 * N.unwrap()}).with_dtype<T>().with_device(device).verify(x);
    const int width = N.unwrap() / kWidth;
    RuntimeCheck(N.unwrap() % kWidth == 0, "unsupported width ", N.unwrap());
    launch(
        silu_and_mul_kernel<T>,
        dim3(div_ceil(width, kBlock), M.unwrap()),
        kBlock,
        device.unwrap(),
        static_cast<const T*>(x.data_ptr()),
        static_cast<T*>(y.data_ptr()),
        width);
  }

  // q_weight and k_weight may be empty: then heads are not normed.
  static void rope_store(
      tvm::ffi::TensorView q,
      tvm::ffi::TensorView k,
      tvm::ffi::TensorView v,
      tvm::ffi::TensorView q_out,
      tvm::ffi::TensorView k_cache,
      tvm::ffi::TensorView v_cache,
      tvm::ffi::TensorView q_weight,
      tvm::ffi::TensorView k_weight,
      tvm::ffi::TensorView cos_sin,
      tvm::ffi::TensorView positions,
      tvm::ffi::TensorView slots,
      double eps) {
    using namespace host;
    auto M = SymbolicSize{"tokens"}, Q = SymbolicSize{"heads of q"}, K = SymbolicSize{"heads of k"}, D = SymbolicSize{"head_dim"};
    auto stride_q = SymbolicSize{"stride of q"}, stride_k = SymbolicSize{"stride of k"}, stride_v = SymbolicSize{"stride of v"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({M, Q, D}).with_strides({stride_q, D, 1}).with_dtype<T>().with_device(device).verify(q);
    TensorMatcher({M, K, D}).with_strides({stride_k, D, 1}).with_dtype<T>().with_device(device).verify(k);
    TensorMatcher({M, K, D}).with_strides({stride_v, D, 1}).with_dtype<T>().with_device(device).verify(v);
    TensorMatcher({M, Q, D}).with_dtype<T>().with_device(device).verify(q_out);
    TensorMatcher({-1, K, D}).with_dtype<T>().with_device(device).verify(k_cache).verify(v_cache);
    const bool norm = q_weight.size(0);
    if (norm) TensorMatcher({D}).with_dtype<T>().with_device(device).verify(q_weight).verify(k_weight);
    TensorMatcher({-1, D}).with_dtype<float>().with_device(device).verify(cos_sin);
    TensorMatcher({M}).with_dtype<int64_t>().with_device(device).verify(positions).verify(slots);
    const int head_dim = D.unwrap();
    RuntimeCheck(head_dim == 64 || head_dim == 128, "unsupported head_dim ", head_dim);
    for (auto* stride : {&stride_q, &stride_k, &stride_v}) {
      RuntimeCheck(stride->unwrap() % kWidth == 0, "rows of q, k or v are not aligned to 16 bytes");
    }
    const RopeStore p{
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        q_out.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        norm ? q_weight.data_ptr() : nullptr,
        norm ? k_weight.data_ptr() : nullptr,
        static_cast<const float*>(cos_sin.data_ptr()),
        static_cast<const int64_t*>(positions.data_ptr()),
        static_cast<const int64_t*>(slots.data_ptr()),
        stride_q.unwrap(),
        stride_k.unwrap(),
        stride_v.unwrap(),
        static_cast<int>(Q.unwrap()),
        static_cast<int>(K.unwrap()),
        static_cast<float>(eps)};
    const int threads = (p.heads_q + 2 * p.heads_k) * (head_dim / 2 / kWidth);
    launch(
        head_dim == 64 ? rope_store_kernel<T, 64> : rope_store_kernel<T, 128>,
        dim3(div_ceil(threads, kBlock), M.unwrap()),
        kBlock,
        device.unwrap(),
        p);
  }
};

}  // namespace er_sglang
