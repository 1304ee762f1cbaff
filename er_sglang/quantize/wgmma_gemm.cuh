// y[M, N] = x[M, K] @ W_hat[N, K]^T + bias for 9 to 128 rows, W_hat in Marlin's int4 layout (marlin_layout.py). Hopper only.
//
// The floor is W_hat's bytes over the memory bandwidth, from about 90 rows on the tensor cores' time. To come near it:
//
// - W_hat is wgmma's A operand, straight from registers: Marlin's layout gives each lane the fragments of four slabs of 16
//   rows of a 64 x 16 tile. Rows of x are wgmma's N, in multiples of 8: 33 rows cost 40.
// - One warp of a block keeps a ring of stages in shared memory full, by the copy engine: 128 of K, for 256 columns of y
//   and all rows of x. Weights of the first stages are requested before the previous kernel has ended (programmatic
//   dependent launch), x after it.
// - Two warpgroups multiply; each of their eight warps takes two slabs of one of the four tiles. It rounds
//   (code - zero) * scale to W_hat's dtype, as `rtn.dequantize_int4` does, while the slabs before are multiplied.
// - K is split over the blocks of a cluster; the parts are added in float32 through distributed shared memory, in a fixed
//   order: no locks, no workspace, and the same bits every time.
//
// Every block of 256 columns reads x from L2: at 64 rows, as many bytes as its weights. Sharing x in a cluster (multicast)
// gained nothing; four warpgroups instead of two, nothing either (both H100).
#pragma once

#include <cooperative_groups.h>
#include <cuda.h>

#include <algorithm>

#include "copy_engine.cuh"
#include "product.cuh"
#include "wgmma.cuh"

namespace er_sglang {

constexpr int kStageTiles = kUnitK / kTileK;
constexpr int kBlockN = 256;
constexpr int kHalfN = kBlockN / 2;  // of a gated product, one half is gate and one up
constexpr int kSwizzleK = 64;  // elements in a swizzled row of x: 128 bytes
constexpr int kWarps = 8;  // that multiply: two warpgroups
constexpr int kPadY = 4;  // floats between rows of the parts: stores without bank conflicts
constexpr int kBarrierBytes = 1024;
constexpr int kRingBytes = 212 * 1024;
constexpr int kDepth = 4;  // products in flight, of a warpgroup

template <typename T>
SGL_DEVICE uint32_t subtract_multiply2(uint32_t a, uint32_t b, uint32_t c) {  // (a - b) * c; the difference is exact
  using T2 = std::conditional_t<std::is_same_v<T, bf16_t>, bf16x2_t, fp16x2_t>;
  const auto as_T2 = [](uint32_t v) { return reinterpret_cast<const T2&>(v); };
  const T2 product = __hmul2(__hsub2(as_T2(a), as_T2(b)), as_T2(c));
  return reinterpret_cast<const uint32_t&>(product);
}

SGL_DEVICE void barrier_arrive_if(bool arrive, uint32_t barrier) {  // no branch: it would serialize the products in flight
  asm volatile(
      "{.reg .pred arrive; setp.ne.b32 arrive, %1, 0; @arrive mbarrier.arrive.shared::cta.b64 _, [%0];}" ::"r"(barrier),
      "r"(int(arrive))
      : "memory");
}

SGL_DEVICE void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

SGL_DEVICE void cluster_arrive_relaxed() {  // without waiting for this thread's writes
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

SGL_DEVICE void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

SGL_DEVICE void copy_codes(uint32_t to, const CUtensorMap& from, int column, int tile, uint32_t barrier) {
  asm volatile(
      "{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once;"
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3}], [%4], once;}" ::"r"(to),
      "l"(&from),
      "r"(column),
      "r"(tile),
      "r"(barrier)
      : "memory");
}

SGL_DEVICE void copy_x(uint32_t to, const CUtensorMap& from, int k, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&from),
      "r"(k),
      "r"(0),
      "r"(barrier)
      : "memory");
}

// kRows: of x, rounded up to a multiple of 8.
template <bool kSymmetric, int kGroup, int kRows>
struct Stage {
  static constexpr int kGroups = kUnitK / kGroup;
  static constexpr int kCodesBytes = kUnitK * kBlockN / 2;
  static constexpr int kHalfXBytes = kRows * kSwizzleK * 2;
  static constexpr int kScalesBytes = kGroups * kBlockN * 2;
  static constexpr int kZerosBytes = kSymmetric ? 0 : kGroups * kBlockN / 2;
  static constexpr int kX = kCodesBytes;  // offsets; x must be aligned to 1024 bytes
  static constexpr int kScales = kX + 2 * kHalfXBytes;
  static constexpr int kZeros = kScales + kScalesBytes;
  static constexpr int kBytes = (kZeros + kZerosBytes + 1023) / 1024 * 1024;
  // One more warp copies. Above 112 rows the sums need more registers than nine warps can have: there a whole warpgroup copies
  // and gives its own away (together no more than the block starts with).
  static constexpr bool kMoveRegisters = kRows > 112;
  static constexpr int kThreads = 32 * (kWarps + (kMoveRegisters ? 4 : 1));
  static constexpr int kStages = kRingBytes / kBytes;
  static constexpr int kPartsBytes = kRows * (kBlockN + kPadY) * 4;
  static constexpr int kSharedBytes = kBarrierBytes + std::max(kStages * kBytes, kPartsBytes) + 1024;  // to align it
};

template <typename T, bool kSymmetric, int kGroup, int kRows>
__global__ void __launch_bounds__(Stage<kSymmetric, kGroup, kRows>::kThreads, 1)
    wgmma_gemm_kernel(
        const __grid_constant__ CUtensorMap x,
        const __grid_constant__ CUtensorMap codes,
        const __grid_constant__ Product p,
        const int begin) {  // the first block of columns
  namespace cg = cooperative_groups;
  using S = Stage<kSymmetric, kGroup, kRows>;
  constexpr int kStages = S::kStages;
  extern __shared__ char shared_unaligned[];
  char* const shared = shared_unaligned + (-__cvta_generic_to_shared(shared_unaligned) & 1023);
  char* const ring = shared + kBarrierBytes;
  const uint32_t full = __cvta_generic_to_shared(shared), empty = full + 8 * kStages;  // barriers, one per stage
  const uint32_t ring_address = full + kBarrierBytes;

  const int split = blockIdx.x;
  // This block's columns: of y, and in `halves` of a gated product those of W_hat.
  const int halves = p.gated ? 2 : 1, block_columns = kBlockN / halves, y_columns = p.n / halves;
  const int block_n = (begin + blockIdx.y) * block_columns;
  const int columns = min(block_columns, y_columns - block_n);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int units = p.k / kUnitK;
  const int first = units * split / p.splits, count = units * (split + 1) / p.splits - first;  // this block's

  device::PDLTriggerSecondary<true>();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) barrier_init(full + 8 * s, 1), barrier_init(empty + 8 * s, kWarps);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp >= kWarps) {  // copies
    if constexpr (S::kMoveRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == kWarps) {
      // Lanes 0 and 16 copy a half's codes, those after them its groups' scales and zeros. The copy engine takes as long for
      // small pieces as for large ones: one for each row of tiles would be the slowest part of the kernel.
      const int half = lane / 16, part = lane % 16, group = (part - 1) % S::kGroups;
      const int column = p.gated ? half * y_columns + block_n : block_n + half * kHalfN;
      const int half_columns = p.gated ? columns : min(kHalfN, columns - half * kHalfN);
      const int64_t first_number = (int64_t(first) * S::kGroups + group) * p.n + column;
      const char* from = nullptr;
      int64_t step = 0;  // bytes
      int to = 0, bytes = 0;
      const bool numbers = part > 0 && half_columns > 0;
      if (numbers && part <= S::kGroups) {
        from = static_cast<const char*>(p.scales) + first_number * 2, step = int64_t(S::kGroups) * p.n * 2;
        to = S::kScales + (group * kBlockN + half * kHalfN) * 2, bytes = half_columns * 2;
      } else if (numbers && !kSymmetric && part <= 2 * S::kGroups) {
        from = reinterpret_cast<const char*>(p.zeros) + first_number / 2, step = int64_t(S::kGroups) * p.n / 2;
        to = S::kZeros + (group * kBlockN + half * kHalfN) / 2, bytes = half_columns / 2;
      }
      const int stage_bytes = S::kCodesBytes + 2 * S::kHalfXBytes + halves * columns * (S::kScalesBytes + S::kZerosBytes) / kBlockN;
      const auto fetch_weights = [&](int i) {  // i = 0, 1, 2, ...
        const uint32_t stage = ring_address + i % kStages * S::kBytes, barrier = full + 8 * (i % kStages);
        if (lane == 0) barrier_expect(barrier, stage_bytes);
        if (part == 0) copy_codes(stage + half * S::kCodesBytes / 2, codes, column, (first + i) * kStageTiles, barrier);
        if (bytes) copy_weights(stage + to, from, bytes, barrier);
        from += step;
      };
      const auto fetch_x = [&](int i) {
        const uint32_t stage = ring_address + i % kStages * S::kBytes + S::kX, barrier = full + 8 * (i % kStages);
        if (lane < 2) copy_x(stage + lane * S::kHalfXBytes, x, (first + i) * kUnitK + lane * kSwizzleK, barrier);
      };
      const int ahead = min(count, kStages);
      for (int i = 0; i < ahead; ++i) fetch_weights(i);
      device::PDLWaitPrimary<true>();
      for (int i = 0; i < ahead; ++i) fetch_x(i);
      for (int i = ahead; i < count; ++i) {
        barrier_wait(empty + 8 * (i % kStages), (i / kStages + 1) % 2);
        fetch_weights(i);
        fetch_x(i);
      }
    }
    __syncwarp();
    for (int i = 0; i < 2; ++i) cluster_arrive_relaxed(), cluster_wait();  // as below
  } else {
    if constexpr (S::kMoveRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    // Warps of a group take tiles 0 1 0 1 or 2 3 2 3, slabs 0 1 or 2 3 of them.
    const int tile = warp / 4 * 2 + warp % 2, slab = warp / 2 % 2 * 2;
    const int r = lane / 4;
    float sum[2][kRows / 2];
    int last = 0;  // stage
    for (int i = 0; i < count; ++i) {
      const int s = i % kStages;
      const char* stage = ring + s * S::kBytes;
      const uint64_t x_descriptor = matrix_descriptor(ring_address + s * S::kBytes + S::kX);
      barrier_wait(full + 8 * s, i / kStages % 2);
      const char* tiles = stage + (tile / 2 * kStageTiles * kHalfN + tile % 2 * kTileN) * kTileK / 2 + lane * 16 + slab * 4;
      uint2 q[kStageTiles];
#pragma unroll
      for (int t = 0; t < kStageTiles; ++t) {
        q[t] = *reinterpret_cast<const uint2*>(tiles + t * kHalfN * kTileK / 2);
      }
#pragma unroll
      for (int g = 0; g < S::kGroups; ++g) {
        // Of this lane's rows r and r + 8 of both slabs, each twice in a register.
        const int first_scale = g * kBlockN + tile * kTileN + r * 8 + slab * 2;
        const uint2 scales = *reinterpret_cast<const uint2*>(stage + S::kScales + first_scale * 2);
        uint32_t scale[2][2], zero[2][2];
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const uint32_t pair = w ? scales.y : scales.x;
          scale[w][0] = __byte_perm(pair, 0, 0x1010), scale[w][1] = __byte_perm(pair, 0, 0x3232);
        }
        uint32_t packed = 0;
        if constexpr (!kSymmetric) {
          packed = *reinterpret_cast<const uint32_t*>(stage + S::kZeros + (g * kBlockN + tile * kTileN + r * 8) / 2);
        }
#pragma unroll
        for (int w = 0; w < 2; ++w) magic_zeros<T, kSymmetric>(zero[w], packed, slab + w);
        uint32_t a[kDepth][4];  // of the products in flight: rows r and r + 8, then the same of the other half of K
#pragma unroll
        for (int j = g * (2 * kGroup / kTileK); j < (g + 1) * (2 * kGroup / kTileK); ++j) {
          const int t = j / 2, w = j % 2;
          const uint32_t c = w ? q[t].y : q[t].x;
          uint32_t (&now)[4] = a[j % kDepth];
          now[0] = subtract_multiply2<T>(magic_codes<T>(c), zero[w][0], scale[w][0]);
          now[1] = subtract_multiply2<T>(magic_codes<T>(c >> 8), zero[w][1], scale[w][1]);
          now[2] = subtract_multiply2<T>(magic_codes<T>(c >> 4), zero[w][0], scale[w][0]);
          now[3] = subtract_multiply2<T>(magic_codes<T>(c >> 12), zero[w][1], scale[w][1]);
          pin(now);
          constexpr int kTilesPerHalf = kSwizzleK / kTileK;
          const uint64_t b = x_descriptor + (t / kTilesPerHalf * S::kHalfXBytes + t % kTilesPerHalf * kTileK * 2) / 16;
          wgmma_fence();
          wgmma(T{}, sum[w], now, b, t || i);
          wgmma_commit();
          wgmma_wait<kDepth - 1>();
          if (j == kDepth - 1) barrier_arrive_if(i > 0 && lane == 0, empty + 8 * last);
        }
      }
      last = s;
    }
    wgmma_wait<0>();

    // The ring is no longer needed: its memory holds this block's part of y, [kRows][kBlockN].
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kWarps) : "memory");
    float* parts = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int w = 0; w < 2; ++w) {
#pragma unroll
      for (int j = 0; j < kRows / 2; ++j) {
        const int row = j / 4 * 8 + lane % 4 * 2 + j % 2, column = tile * kTileN + 16 * (slab + w) + j / 2 % 2 * 8 + r;
        parts[row * (kBlockN + kPadY) + column] = sum[w][j];
      }
    }

    // Add the parts of all splits; each block of them stores its share of y.
    cluster_arrive();
    cluster_wait();
    const auto cluster = cg::this_cluster();
    for (int i = (split * 32 * kWarps + threadIdx.x) * 4; i < p.m * block_columns; i += p.splits * 32 * kWarps * 4) {
      const int row = i / block_columns, column = i % block_columns;
      if (column >= columns) continue;
      T out[4];
      for (int h = 0; h < halves; ++h) {
        const float* parts = reinterpret_cast<const float*>(ring) + row * (kBlockN + kPadY) + h * block_columns + column;
        float4 part[kMostSplits];  // all at once: another block's memory is far
#pragma unroll
        for (int s = 0; s < kMostSplits; ++s) {
          part[s] = s < p.splits ? *reinterpret_cast<const float4*>(cluster.map_shared_rank(parts, s)) : float4{};
        }
        float total[4] = {};
#pragma unroll
        for (int s = 0; s < kMostSplits; ++s) {
          total[0] += part[s].x, total[1] += part[s].y, total[2] += part[s].z, total[3] += part[s].w;
        }
        finish(out, total, p.bias, h * y_columns + block_n + column, h == 1);
      }
      *reinterpret_cast<uint2*>(static_cast<T*>(p.y) + int64_t(row) * y_columns + block_n + column) = reinterpret_cast<const uint2&>(out);
    }
    cluster_arrive_relaxed();
    cluster_wait();  // nobody leaves while others read its part
  }
}

// How the copy engine finds boxes of a matrix whose rows are `stride` bytes apart; beyond the matrix it finds zeros.
inline CUtensorMap map_matrix(
    const void* matrix,
    CUtensorMapDataType type,
    CUtensorMapSwizzle swizzle,
    int64_t rows,
    int64_t columns,
    int64_t stride,
    int box_rows,
    int box_columns) {
  static const auto encode = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found;
    host::RuntimeDeviceCheck(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found));
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);
  }();
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride)};
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, steps[2] = {1, 1};
  const CUresult result = encode(
      &map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  host::RuntimeCheck(result == CUDA_SUCCESS, "the copy engine cannot read this matrix: error ", int(result));
  return map;
}

template <typename T, bool kSymmetric, int kGroup>
struct WgmmaGemm {
  static constexpr auto kType = std::is_same_v<T, bf16_t> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static constexpr int kMostRows = 128;

  template <int kRows>
  static auto allowed_kernel() {
    constexpr auto kernel = wgmma_gemm_kernel<T, kSymmetric, kGroup, kRows>;
    constexpr int kBytes = Stage<kSymmetric, kGroup, kRows>::kSharedBytes;
    static const auto result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    host::RuntimeDeviceCheck(result);
    return kernel;
  }

  template <int kRows = kMostRows>
  static void launch(const Product& p, int begin, int columns, DLDevice device) {
    if constexpr (kRows > 8) {
      if (p.m <= kRows - 8) return launch<kRows - 8>(p, begin, columns, device);
    }
    using S = Stage<kSymmetric, kGroup, kRows>;
    const dim3 grid(p.splits, columns);
    const auto x_map = map_matrix(p.x, kType, CU_TENSOR_MAP_SWIZZLE_128B, p.m, p.k, p.row_stride_x * sizeof(T), kRows, kSwizzleK);
    // A column of a row of tiles is 16 codes, 8 bytes.
    const auto codes_map = map_matrix(
        p.codes, CU_TENSOR_MAP_DATA_TYPE_INT64, CU_TENSOR_MAP_SWIZZLE_NONE, p.k / kTileK, p.n, int64_t(p.n) * 8, kStageTiles, kHalfN);
    host::LaunchKernel(grid, S::kThreads, device, S::kSharedBytes)
        .config({.use_pdl = true, .cluster_dim = dim3(p.splits)})(allowed_kernel<kRows>(), x_map, codes_map, p, begin);
  }

  // Clusters of that many blocks that the chip runs at once.
  static int64_t resident_clusters(int64_t splits) {
    using S = Stage<kSymmetric, kGroup, kMostRows>;
    cudaLaunchAttribute attribute{.id = cudaLaunchAttributeClusterDimension};
    attribute.val.clusterDim = {static_cast<unsigned>(splits), 1, 1};
    cudaLaunchConfig_t config{.gridDim = dim3(splits), .blockDim = dim3(S::kThreads), .dynamicSmemBytes = S::kSharedBytes};
    config.attrs = &attribute, config.numAttrs = 1;
    int clusters = 0;
    host::RuntimeDeviceCheck(cudaOccupancyMaxActiveClusters(&clusters, allowed_kernel<kMostRows>(), &config));
    return clusters;
  }

  // Operands as of checked_product. Only `columns` blocks of columns, from `begin` on, are computed.
  static void
  run(tvm::ffi::TensorView x,
      tvm::ffi::TensorView codes,
      tvm::ffi::TensorView scales,
      tvm::ffi::TensorView zeros,
      tvm::ffi::TensorView bias,
      tvm::ffi::TensorView y,
      bool gated,
      int64_t begin,
      int64_t columns,
      int64_t splits) {
    const Product p = checked_product<T, kSymmetric, kGroup>(x, codes, scales, zeros, bias, y, gated, splits, kMostRows);
    const bool exist = 0 <= begin && 1 <= columns && begin + columns <= host::div_ceil(p.n, kBlockN);
    host::RuntimeCheck(exist, "no blocks of columns ", begin, " to ", begin + columns, " for n ", p.n);
    launch(p, static_cast<int>(begin), static_cast<int>(columns), x.device());
  }
};

}  // namespace er_sglang
