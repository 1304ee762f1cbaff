// y[M, N] = x[M, K] @ W_hat[N, K]^T + bias for the few rows of a draft step, W_hat in Marlin's int4 layout (marlin_layout.py). Hopper
// only.
//
// Up to 16 rows. The product is a read of W_hat: the floor is its bytes over the memory bandwidth. What it takes to come near:
//
// - Every warp has a ring of its own in shared memory, of units of 128 columns of W_hat by 64 rows, that the copy engine keeps
//   full; it waits for nobody. Marlin's layout gives each lane the A operand of four m16n8k16 products (W_hat's rows are the
//   product's rows, x's are its columns) in 16 bytes.
// - A block takes half a multiprocessor, or less, and lets the next kernel start at once (programmatic dependent launch). So the
//   next product is there, and fills its rings, while this one ends and while the small kernels between them run: memory
//   does not fall idle at every boundary. See drafting/small_kernels.cuh for why that is safe.
// - K is split until most multiprocessors have a block, over the warps of a block and over the blocks of a cluster; the parts are
//   added in float32 through distributed shared memory, in a fixed order: no locks, no workspace, and the same bits every time.
// - Codes become exact small integers (two bit operations and a subtraction for two weights); a group's scale is applied to its
//   float32 sum.
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/utils.cuh>

#include <cooperative_groups.h>
#include <tvm/ffi/container/tensor.h>

#include <algorithm>
#include <cstdint>

#include "copies.cuh"
#include "int4.cuh"
#include "mma.cuh"

namespace er_sglang {

constexpr int kUnitK = 128;  // a warp's piece of K, by one tile of W_hat's rows; holds one or more groups
constexpr int kUnitTiles = kUnitK / kTileK;
constexpr int kStages = 3;  // units in a warp's ring
constexpr int kPadX = 8;  // elements between rows of x in shared memory: ldmatrix without bank conflicts
constexpr int kPadY = 4;  // floats between rows of the parts: stores without bank conflicts

template <typename T>
SGL_DEVICE uint32_t subtract2(uint32_t a, uint32_t b) {
  using T2 = std::conditional_t<std::is_same_v<T, bf16_t>, bf16x2_t, fp16x2_t>;
  const T2 difference = __hsub2(reinterpret_cast<const T2&>(a), reinterpret_cast<const T2&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}

SGL_DEVICE void load_x_fragments(uint32_t (&b)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(shared_address));
}

struct Operands {
  const void* x;        // [M, K], rows row_stride_x apart
  const uint4* codes;   // [K / 16, N / 64, 32]
  const void* scales;   // [K / group, N]
  const uint32_t* zeros;  // [K / group, N / 8], asymmetric only
  const void* bias;     // [N] or null
  void* y;              // [M, N]
  int m, n, k;
  int row_stride_x;
};

// A unit in shared memory: codes, then scales, then zeros of its groups.
template <bool kSymmetric, int kGroup>
struct Unit {
  static constexpr int kGroups = kUnitK / kGroup;
  static constexpr int kTileBytes = kTileN * kTileK / 2;
  static constexpr int kScalesBytes = kTileN * 2;
  static constexpr int kZerosBytes = kSymmetric ? 0 : kTileN / 2;
  static constexpr int kScales = kUnitTiles * kTileBytes;  // offsets
  static constexpr int kZeros = kScales + kGroups * kScalesBytes;
  static constexpr int kBytes = kZeros + kGroups * kZerosBytes;
};

// A block's shared memory: rings, then barriers, then x; after the last product, the parts, [kWarpsK][8 kTilesM][kBlockN].
template <bool kSymmetric, int kGroup, int kTilesM, int kWarpsN, int kWarpsK>
struct Layout {
  static constexpr int kWarps = kWarpsN * kWarpsK;
  static constexpr int kBlockN = kWarpsN * kTileN;
  static constexpr int kRingBytes = kStages * Unit<kSymmetric, kGroup>::kBytes;
  static constexpr int kBarriers = kWarps * kRingBytes;
  static constexpr int kX = kBarriers + (kWarps * kStages + 2) / 2 * 16;
  static constexpr int kStrideY = kBlockN + kPadY;

  static SGL_DEVICE __host__ int stride_x(int units) { return units * kUnitK + kPadX; }
  static int bytes(int m, int units) {
    return std::max<int>(kX + m * stride_x(units) * 2, kWarpsK * 8 * kTilesM * kStrideY * sizeof(float));
  }
};

template <typename T, bool kSymmetric, int kGroup, int kTilesM, int kWarpsN, int kWarpsK>
__global__ void __launch_bounds__(kWarpsN * kWarpsK * 32, 2) small_batch_gemm_kernel(const __grid_constant__ Operands p) {
  namespace cg = cooperative_groups;
  using U = Unit<kSymmetric, kGroup>;
  using L = Layout<kSymmetric, kGroup, kTilesM, kWarpsN, kWarpsK>;
  constexpr int kThreads = 32 * L::kWarps;
  constexpr int kBlockN = L::kBlockN;
  constexpr int kRows = 8 * kTilesM;
  extern __shared__ __align__(16) char shared[];

  device::PDLTriggerSecondary<true>();
  const auto cluster = cg::this_cluster();
  const int split = cluster.block_rank(), splits = cluster.num_blocks();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int r = lane / 4;
  const int warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;
  const int block_n = blockIdx.y * kBlockN;
  const int n0 = block_n + warp_n * kTileN;

  const int units = p.k / kUnitK;
  const int first = units * split / splits, last = units * (split + 1) / splits;  // this block's
  const int mine = n0 < p.n ? max(0, last - first - warp_k + kWarpsK - 1) / kWarpsK : 0;  // this warp's: every kWarpsK-th

  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t full = base + L::kBarriers + warp * kStages * 8, x_full = base + L::kBarriers + L::kWarps * kStages * 8;
  if (lane == 0) {
    for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1);
    if (warp == 0) barrier_init(x_full, 1);
    barrier_init_fence();
  }
  __syncthreads();

  // What this lane copies of a unit: a tile of codes, or a group's scales or zeros.
  const int unit = first + warp_k, group = lane % U::kGroups;
  const char* from = nullptr;
  int64_t step = 0;
  int to = 0, bytes = 0;
  if (lane < kUnitTiles) {
    const int64_t tile_stride = int64_t(p.n) * kTileK / 2;
    from = reinterpret_cast<const char*>(p.codes) + (unit * kUnitTiles + lane) * tile_stride + n0 * (kTileK / 2);
    step = kWarpsK * kUnitTiles * tile_stride, to = lane * U::kTileBytes, bytes = U::kTileBytes;
  } else if (lane < kUnitTiles + U::kGroups) {
    from = static_cast<const char*>(p.scales) + ((int64_t(unit) * U::kGroups + group) * p.n + n0) * 2;
    step = int64_t(kWarpsK) * U::kGroups * p.n * 2, to = U::kScales + group * U::kScalesBytes, bytes = U::kScalesBytes;
  } else if (!kSymmetric && lane < kUnitTiles + 2 * U::kGroups) {
    from = reinterpret_cast<const char*>(p.zeros) + ((int64_t(unit) * U::kGroups + group) * p.n + n0) / 2;
    step = int64_t(kWarpsK) * U::kGroups * p.n / 2, to = U::kZeros + group * U::kZerosBytes, bytes = U::kZerosBytes;
  }
  char* const ring = shared + warp * L::kRingBytes;
  const auto fetch = [&](int stage) {  // the next unit
    const uint32_t barrier = full + 8 * stage;
    if (lane == 0) barrier_expect(barrier, U::kBytes);
    if (bytes) copy_weights(base + warp * L::kRingBytes + stage * U::kBytes + to, from, bytes, barrier);
    from += step;
  };
  for (int s = 0; s < min(kStages, mine); ++s) fetch(s);

  // This block's part of x.
  const int stride_x = L::stride_x(last - first);
  if (warp == 0) {
    device::PDLWaitPrimary<true>();
    const int row_bytes = (last - first) * kUnitK * 2;
    if (lane == 0) barrier_expect(x_full, p.m * row_bytes);
    __syncwarp();
    if (lane < p.m) {
      const T* row = static_cast<const T*>(p.x) + int64_t(lane) * p.row_stride_x + first * kUnitK;
      copy_bulk(base + L::kX + lane * stride_x * 2, row, row_bytes, x_full);
    }
    __syncwarp();
  }
  barrier_wait(x_full, 0);

  float sum[4][kTilesM][4] = {};  // [16 rows of W_hat][8 rows of x][this lane's part of the product]
  // Rows beyond M are columns of the product that nobody reads: any numbers will do, in banks of their own.
  uint32_t fragment[kTilesM];
  int fragment_step[kTilesM];
#pragma unroll
  for (int j = 0; j < kTilesM; ++j) {
    const int row = 8 * j + lane % 8;
    const bool there = row < p.m;
    fragment[j] = base + L::kX % 128 + (there ? L::kX / 128 * 128 + (row * stride_x + warp_k * kUnitK) * 2 : row * kPadX * 2) + lane / 8 * 16;
    fragment_step[j] = there ? kWarpsK * kUnitK * 2 : 0;
  }
  int stage = 0, parity = 0;
  for (int i = 0; i < mine; ++i) {
    const char* codes = ring + stage * U::kBytes;
    barrier_wait(full + 8 * stage, parity);
#pragma unroll
    for (int g = 0; g < U::kGroups; ++g) {
      float part[4][kTilesM][4] = {};
      uint32_t b[kTilesM][4];
      uint32_t zeros = 0;
      if constexpr (!kSymmetric) zeros = *reinterpret_cast<const uint32_t*>(codes + U::kZeros + g * U::kZerosBytes + r * 4);
#pragma unroll
      for (int t = g * (kGroup / kTileK); t < (g + 1) * (kGroup / kTileK); ++t) {
        const uint4 tile = *reinterpret_cast<const uint4*>(codes + t * U::kTileBytes + lane * 16);
        const uint32_t q[4] = {tile.x, tile.y, tile.z, tile.w};
        if (t % 2 == 0) {
#pragma unroll
          for (int j = 0; j < kTilesM; ++j) load_x_fragments(b[j], fragment[j] + t * kTileK * 2);
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          uint32_t zero[2];
          magic_zeros<T, kSymmetric>(zero, zeros, w);
          uint32_t a[4];  // rows r and r + 8, then the same of the other half of K
          a[0] = subtract2<T>(magic_codes<T>(q[w]), zero[0]);
          a[1] = subtract2<T>(magic_codes<T>(q[w] >> 8), zero[1]);
          a[2] = subtract2<T>(magic_codes<T>(q[w] >> 4), zero[0]);
          a[3] = subtract2<T>(magic_codes<T>(q[w] >> 12), zero[1]);
#pragma unroll
          for (int j = 0; j < kTilesM; ++j) multiply_add<T>(part[w][j], a, b[j][t % 2 * 2], b[j][t % 2 * 2 + 1]);
        }
      }
      const uint4 scales = *reinterpret_cast<const uint4*>(codes + U::kScales + g * U::kScalesBytes + r * 16);
      const T* scale = reinterpret_cast<const T*>(&scales);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
#pragma unroll
        for (int j = 0; j < kTilesM; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[w][j][c] += static_cast<float>(scale[2 * w + c / 2]) * part[w][j][c];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTilesM; ++j) fragment[j] += fragment_step[j];
    __syncwarp();  // the unit may be overwritten
    if (i + kStages < mine) fetch(stage);
    if (++stage == kStages) stage = 0, parity ^= 1;
  }

  // Add the parts of all warps and blocks.
  constexpr int kStrideY = L::kStrideY;
  float* parts = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int j = 0; j < kTilesM; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * j + lane % 4 * 2 + i % 2, column = warp_n * kTileN + 16 * w + 8 * (i / 2) + r;
        parts[(warp_k * kRows + row) * kStrideY + column] = sum[w][j][i];
      }
    }
  }
  cluster.sync();
  const int columns = min(kBlockN, p.n - block_n);
  for (int i = (split * kThreads + threadIdx.x) * 2; i < p.m * kBlockN; i += splits * kThreads * 2) {
    const int row = i / kBlockN, column = i % kBlockN;
    if (column >= columns) continue;
    float y[2] = {0, 0};
    for (int s = 0; s < splits; ++s) {
      const float* theirs = cluster.map_shared_rank(parts, s);
#pragma unroll
      for (int w = 0; w < kWarpsK; ++w) {
        const float2 part = *reinterpret_cast<const float2*>(theirs + (w * kRows + row) * kStrideY + column);
        y[0] += part.x, y[1] += part.y;
      }
    }
    if (p.bias) {
      const T* bias = static_cast<const T*>(p.bias) + block_n + column;
      y[0] += static_cast<float>(bias[0]), y[1] += static_cast<float>(bias[1]);
    }
    T* out = static_cast<T*>(p.y) + int64_t(row) * p.n + block_n + column;
    T pair[2] = {static_cast<T>(y[0]), static_cast<T>(y[1])};
    *reinterpret_cast<uint32_t*>(out) = *reinterpret_cast<const uint32_t*>(pair);
  }
  cluster.sync();  // nobody leaves while others read its parts
}

template <typename T, bool kSymmetric, int kGroup>
struct SmallBatchGemm {
  template <int kTilesM, int kWarpsN, int kWarpsK>
  static void launch(const Operands& p, int splits, DLDevice device) {
    using L = Layout<kSymmetric, kGroup, kTilesM, kWarpsN, kWarpsK>;
    constexpr auto kernel = small_batch_gemm_kernel<T, kSymmetric, kGroup, kTilesM, kWarpsN, kWarpsK>;
    const int shared_bytes = L::bytes(p.m, host::div_ceil(p.k / kUnitK, splits));
    static int allowed_bytes = 48 * 1024;
    if (shared_bytes > allowed_bytes) {
      host::RuntimeDeviceCheck(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
      allowed_bytes = shared_bytes;
    }
    const dim3 grid(splits, host::div_ceil(p.n, L::kBlockN));
    host::LaunchKernel(grid, 32 * L::kWarps, device, shared_bytes)
        .config({.use_pdl = true, .cluster_dim = dim3(splits)})(kernel, p);
  }

  template <int kTilesM>
  static void launch(const Operands& p, int splits, int warps_n, int warps_k, DLDevice device) {
    switch (warps_n * 10 + warps_k) {
      case 42: return launch<kTilesM, 4, 2>(p, splits, device);
      case 24: return launch<kTilesM, 2, 4>(p, splits, device);
      case 81: return launch<kTilesM, 8, 1>(p, splits, device);
      default: host::Panic("no kernel for ", warps_n, " x ", warps_k, " warps");
    }
  }

  // zeros and bias may be empty. warps_n: warps of a block side by side along N; splits: blocks that share K, 1 to 8.
  static void
  run(tvm::ffi::TensorView x,
      tvm::ffi::TensorView codes,
      tvm::ffi::TensorView scales,
      tvm::ffi::TensorView zeros,
      tvm::ffi::TensorView bias,
      tvm::ffi::TensorView y,
      int64_t warps_n,
      int64_t warps_k,
      int64_t splits) {
    using namespace host;
    auto M = SymbolicSize{"M"}, N = SymbolicSize{"N"}, K = SymbolicSize{"K"}, stride = SymbolicSize{"row stride of x"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({M, K}).with_strides({stride, 1}).with_dtype<T>().with_device(device).verify(x);
    TensorMatcher({M, N}).with_dtype<T>().with_device(device).verify(y);
    TensorMatcher({K.unwrap() / kTileK, 2 * N.unwrap()}).with_dtype<int32_t>().with_device(device).verify(codes);
    TensorMatcher({K.unwrap() / kGroup, N}).with_dtype<T>().with_device(device).verify(scales);
    const int m = M.unwrap(), n = N.unwrap(), k = K.unwrap();
    RuntimeCheck(1 <= m && m <= 16 && n % kTileN == 0 && k % kUnitK == 0, "unsupported shape: m ", m, ", n ", n, ", k ", k);
    RuntimeCheck(stride.unwrap() % 8 == 0, "rows of x are not aligned to 16 bytes");
    RuntimeCheck(1 <= splits && splits <= 8, "splits is ", splits, "; it must be 1 to 8");
    if constexpr (!kSymmetric) TensorMatcher({k / kGroup, n / 8}).with_dtype<int32_t>().with_device(device).verify(zeros);
    if (bias.size(0)) TensorMatcher({N}).with_dtype<T>().with_device(device).verify(bias);
    const Operands p{
        x.data_ptr(),
        static_cast<const uint4*>(codes.data_ptr()),
        scales.data_ptr(),
        kSymmetric ? nullptr : static_cast<const uint32_t*>(zeros.data_ptr()),
        bias.size(0) ? bias.data_ptr() : nullptr,
        y.data_ptr(),
        m,
        n,
        k,
        static_cast<int>(stride.unwrap())};
    if (m <= 8) return launch<1>(p, splits, warps_n, warps_k, device.unwrap());
    return launch<2>(p, splits, warps_n, warps_k, device.unwrap());
  }
};

}  // namespace er_sglang
