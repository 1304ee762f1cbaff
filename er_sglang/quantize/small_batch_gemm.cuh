// y[M, N] = x[M, K] @ W_hat[N, K]^T + bias for the few rows of a draft step, W_hat in Marlin's int4 layout (marlin_layout.py).
//
// Up to 8 rows. The product is a read of W_hat: the floor is its bytes over the memory bandwidth. What it takes to come near:
//
// - Weights go from memory to registers, no shared memory in between. Marlin's layout gives each lane the A operand of four
//   m16n8k16 products (W_hat's rows are the product's rows, x's are its columns) in one 16-byte load; a ring of eight such loads
//   per lane is always in flight.
// - K is split until all warps of the chip have work, over the warps of a block and over the blocks of a cluster. A block adds up
//   its warps' parts and sends each other block its share of the sums, through distributed shared memory, where they are added in
//   float32, in a fixed order: no locks, no workspace, and the same bits every time. Sent, not fetched: a store need not be waited
//   for, and nobody waits for the others to have read.
// - Codes become exact small integers (two bit operations and a subtraction for two weights); a group's scale is applied to its
//   float32 sum.
// - The first weights are requested before the previous kernel has ended (programmatic dependent launch).
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "mma.cuh"
#include "product.cuh"

namespace er_sglang {

constexpr int kUnitTiles = kUnitK / kTileK;  // a warp's piece at a time, by one tile of W_hat's rows
constexpr int kRows = 8;  // of x, at most
constexpr int kPadX = 8;  // elements between rows of x in shared memory: ldmatrix without bank conflicts
constexpr int kPadY = 4;  // floats between rows of the parts: stores without bank conflicts
constexpr int kShareUnit = 32;  // a share of y is whole warps' work

// Pairs of neighbouring elements of y that each block of a cluster finishes, of `pairs` that all of them have.
__host__ __device__ constexpr int share_of(int pairs, int splits) {
  return (pairs + splits * kShareUnit - 1) / (splits * kShareUnit) * kShareUnit;
}

SGL_DEVICE uint4 load_once(const uint4* address) {  // a weight is read once a step: leave L1 to the rest
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

SGL_DEVICE void copy_async_16(uint32_t shared_address, const void* address) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address), "l"(address));
}

template <typename T, bool kSymmetric, int kGroup, int kWarpsN, int kWarpsK>
__global__ void __launch_bounds__(kWarpsN * kWarpsK * 32, 20 / (kWarpsN * kWarpsK))
    small_batch_gemm_kernel(const __grid_constant__ Product p, const int inbox_offset) {
  namespace cg = cooperative_groups;
  constexpr int kThreads = kWarpsN * kWarpsK * 32;
  constexpr int kGroups = kUnitK / kGroup;
  constexpr int kBlockN = kWarpsN * kTileN;
  extern __shared__ __align__(16) char shared[];

  const auto cluster = cg::this_cluster();
  const int split = cluster.block_rank(), splits = cluster.num_blocks();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");  // others may send from here on
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = lane / 4;
  const int warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;
  // Its columns: of y, and in `halves` of a gated product those of W_hat.
  const int halves = p.gated ? 2 : 1, block_columns = kBlockN / halves, y_columns = p.n / halves;
  const int begin = blockIdx.y * block_columns, columns = min(block_columns, y_columns - begin);
  const int half = warp_n * kTileN / block_columns, in_half = warp_n * kTileN % block_columns;
  const int n0 = half * y_columns + begin + in_half;
  const bool has_columns = in_half < columns;

  const int units = p.k / kUnitK;
  const int first = units * split / splits, last = units * (split + 1) / splits;  // this block's
  const int stride_x = (last - first) * kUnitK + kPadX;

  // The first weights.
  const int64_t tile_stride = p.n / 2;  // in uint4: N / 64 tiles of 32
  int unit = first + warp_k;
  const uint4* next = static_cast<const uint4*>(p.codes) + unit * kUnitTiles * tile_stride + n0 / 2 + lane;
  const char* next_scales = static_cast<const char*>(p.scales) + (int64_t(unit) * kGroups * p.n + n0 + r * 8) * sizeof(T);
  const uint32_t* next_zeros = kSymmetric ? nullptr : p.zeros + (int64_t(unit) * kGroups * p.n + n0) / 8 + r;
  uint4 ring[kUnitTiles];
  uint4 scales[kGroups];
  uint32_t zeros[kGroups];
  bool active = has_columns && unit < last;
  const auto load_scales = [&] {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      scales[g] = *reinterpret_cast<const uint4*>(next_scales + int64_t(g) * p.n * sizeof(T));
      if constexpr (!kSymmetric) zeros[g] = next_zeros[int64_t(g) * p.n / 8];
    }
    next_scales += int64_t(kWarpsK) * kGroups * p.n * sizeof(T);
    if constexpr (!kSymmetric) next_zeros += int64_t(kWarpsK) * kGroups * p.n / 8;
  };
  if (active) {
#pragma unroll
    for (int t = 0; t < kUnitTiles; ++t) ring[t] = load_once(next + t * tile_stride);
    load_scales();
  }

  // This block's part of x; rows from M on stay undefined: they are columns of the product that nobody reads.
  device::PDLWaitPrimary<true>();
  const uint32_t shared_x = __cvta_generic_to_shared(shared);
  {
    const int vectors = (last - first) * (kUnitK / 8);
    const T* x = static_cast<const T*>(p.x) + first * kUnitK;
    for (int i = threadIdx.x; i < p.m * vectors; i += kThreads) {
      const int row = i / vectors, column = i % vectors * 8;
      copy_async_16(shared_x + (row * stride_x + column) * sizeof(T), x + int64_t(row) * p.row_stride_x + column);
    }
    asm volatile("cp.async.wait_all;");
    __syncthreads();
  }

  float sum[4][4] = {};  // [16 rows of W_hat][this lane's part of the product]
  uint32_t fragment = shared_x + ((lane % 8) * stride_x + (unit - first) * kUnitK + lane / 8 * 8) * sizeof(T);
  while (active) {
    unit += kWarpsK;
    const bool more = unit < last;
    next += int64_t(kWarpsK) * kUnitTiles * tile_stride;
    uint4 group_scales[kGroups];
    uint32_t group_zeros[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) group_scales[g] = scales[g], group_zeros[g] = zeros[g];
    if (more) load_scales();

#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      float part[4][4] = {};
      uint32_t b[4];
#pragma unroll
      for (int i = 0; i < kGroup / kTileK; ++i) {  // counted so, nvcc unrolls groups of 64 too: the ring stays in registers
        const int t = g * (kGroup / kTileK) + i;
        const uint32_t q[4] = {ring[t].x, ring[t].y, ring[t].z, ring[t].w};
        if (more) ring[t] = load_once(next + t * tile_stride);
        if (t % 2 == 0) load_x_fragments(b, fragment + t * kTileK * sizeof(T));
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t zero[2];
          magic_zeros<T, kSymmetric>(zero, group_zeros[g], w);
          uint32_t a[4];  // rows r and r + 8, then the same of the other half of K
          a[0] = subtract2<T>(magic_codes<T>(q[w]), zero[0]);
          a[1] = subtract2<T>(magic_codes<T>(q[w] >> 8), zero[1]);
          a[2] = subtract2<T>(magic_codes<T>(q[w] >> 4), zero[0]);
          a[3] = subtract2<T>(magic_codes<T>(q[w] >> 12), zero[1]);
          multiply_add<T>(part[w], a, b[t % 2 * 2], b[t % 2 * 2 + 1]);
        }
      }
      const T* scale = reinterpret_cast<const T*>(&group_scales[g]);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[w][i] += static_cast<float>(scale[2 * w + i / 2]) * part[w][i];
      }
    }
    fragment += kWarpsK * kUnitK * sizeof(T);
    active = more;
  }

  // Add the parts of this block's warps. x is no longer needed: its memory holds them, [kWarpsK][kRows][kBlockN].
  device::PDLTriggerSecondary<true>();
  constexpr int kStrideY = kBlockN + kPadY;
  float* parts = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 * 2 + i % 2, column = warp_n * kTileN + 16 * w + 8 * (i / 2) + r;
      parts[(warp_k * kRows + row) * kStrideY + column] = sum[w][i];
    }
  }
  __syncthreads();
  // Send each block its share of the sums, [splits][halves][share] there. All have started, so their memory is theirs.
  const int pairs = p.m * block_columns / 2, share = share_of(pairs, splits);
  float2* inbox = reinterpret_cast<float2*>(shared + inbox_offset);
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int i = threadIdx.x; i < pairs * halves; i += kThreads) {
    const int h = i >= pairs, pair = i - h * pairs;
    const int row = 2 * pair / block_columns, column = 2 * pair % block_columns;
    float2 total = {};
#pragma unroll
    for (int w = 0; w < kWarpsK; ++w) {
      const float2 part = *reinterpret_cast<const float2*>(parts + (w * kRows + row) * kStrideY + h * block_columns + column);
      total.x += part.x, total.y += part.y;
    }
    const int to = pair / share;
    *cluster.map_shared_rank(inbox + (split * halves + h) * share + pair - to * share, to) = total;
  }
  cluster.sync();
  // Add what all blocks have sent.
  for (int i = threadIdx.x; i < share && split * share + i < pairs; i += kThreads) {
    const int pair = split * share + i;
    const int row = 2 * pair / block_columns, column = 2 * pair % block_columns;
    if (column >= columns) continue;
    T out[2];
    for (int h = 0; h < halves; ++h) {
      float total[2] = {};
#pragma unroll
      for (int s = 0; s < kMostSplits; ++s) {
        if (s == splits) break;
        const float2 sent = inbox[(s * halves + h) * share + i];
        total[0] += sent.x, total[1] += sent.y;
      }
      finish(out, total, p.bias, h * y_columns + begin + column, h == 1);
    }
    *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + int64_t(row) * y_columns + begin + column) = reinterpret_cast<const uint32_t&>(out);
  }
}

template <typename T, bool kSymmetric, int kGroup>
struct SmallBatchGemm {
  template <int kWarpsN, int kWarpsK>
  static void launch(const Product& p, DLDevice device) {
    constexpr auto kernel = small_batch_gemm_kernel<T, kSymmetric, kGroup, kWarpsN, kWarpsK>;
    constexpr int kBlockN = kWarpsN * kTileN;
    const int units = p.k / kUnitK;
    const int x_bytes = kRows * (host::div_ceil(units, p.splits) * kUnitK + kPadX) * sizeof(T);
    const int parts_bytes = kWarpsK * kRows * (kBlockN + kPadY) * sizeof(float);
    const int inbox = std::max(x_bytes, parts_bytes);
    const int shared_bytes = inbox + p.splits * 2 * share_of(kRows * kBlockN / 4, p.splits) * int(sizeof(float2));
    static int allowed_bytes = 48 * 1024;
    if (shared_bytes > allowed_bytes) {
      host::RuntimeDeviceCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
      allowed_bytes = shared_bytes;
    }
    const dim3 grid(p.splits, host::div_ceil(p.n, kBlockN));
    host::LaunchKernel(grid, kWarpsN * kWarpsK * 32, device, shared_bytes)
        .config({.use_pdl = true, .cluster_dim = dim3(p.splits)})(kernel, p, inbox);
  }

  // Operands as of checked_product. warps_n: warps of a block side by side along N.
  static void
  run(tvm::ffi::TensorView x,
      tvm::ffi::TensorView codes,
      tvm::ffi::TensorView scales,
      tvm::ffi::TensorView zeros,
      tvm::ffi::TensorView bias,
      tvm::ffi::TensorView y,
      bool gated,
      int64_t warps_n,
      int64_t warps_k,
      int64_t splits) {
    const Product p = checked_product<T, kSymmetric, kGroup>(x, codes, scales, zeros, bias, y, gated, splits, kRows);
    switch (warps_n * 10 + warps_k) {
      case 42: return launch<4, 2>(p, x.device());
      case 24: return launch<2, 4>(p, x.device());
      case 41: return launch<4, 1>(p, x.device());
      default: host::Panic("no kernel for ", warps_n, " x ", warps_k, " warps");
    }
  }
};

}  // namespace er_sglang
