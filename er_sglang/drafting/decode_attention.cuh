// Attention of a drafted token: one query per request, over the KV slots that the request's row of the request table lists.
// Hopper only; up to 8 query heads share a KV head.
//
// The floor is the bytes of the KV cache over the memory bandwidth. What it takes to come near, for one request or many, of equal
// or very different lengths:
//
// - Tiles of 64 tokens of a KV head are shared out evenly: each block takes a run of them, across heads and requests. A head's
//   run that several blocks share is added up by the one that finishes last, in the order of the tokens.
// - A warp copies its 16 tokens of a tile into a ring of its own and waits for nobody; only at the end of a head's run do the
//   four warps of a block meet. Two blocks keep 64 to 128 KB in flight on each multiprocessor.
// - Tokens are the rows of both products, K q^T and V^T p^T, and heads their 8 columns, so that no half of a product is padding.
// - Keys and values written by earlier steps are requested before the previous kernel has ended (programmatic dependent launch),
//   those of this step, by the kernel before, after it. See small_kernels.cuh for why this is safe: each token begins with an
//   ordinary kernel, so all of the token before has ended.
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/utils.cuh>

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <type_traits>

#include "../quantize/mma.cuh"

namespace er_sglang {

constexpr int kWarps = 4;
constexpr int kWarpTokens = 16;
constexpr int kTileTokens = kWarps * kWarpTokens;
constexpr int kStages = 2;
constexpr int kBlocks = 2;  // of a multiprocessor
constexpr int kHeads = 8;
constexpr int kMostRequests = 512;

struct Attention {
  const void* q;        // [requests, heads_q, head_dim]
  const void* k_cache;  // [slots, heads_k, head_dim]
  const void* v_cache;
  void* out;                    // as q
  const int32_t* req_to_token;  // [rows, row_stride]: KV slots of a request's tokens
  const int64_t* rows;          // [requests]
  const int64_t* lengths;       // [requests], at least 1
  float* parts;                 // [blocks, 2, warps, numbers of a state's share, 32]: of a block's first and last run
  int* arrivals;                // [requests, heads_k]: blocks that have finished a shared run; zero before and after
  int64_t row_stride;
  int requests, heads_q, heads_k;
  float scale;  // of q k^T, times log2(e)
};

template <typename T>
SGL_DEVICE uint32_t pack2(float low, float high) {
  if constexpr (std::is_same_v<T, bf16_t>) {
    const bf16x2_t v = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  } else {
    const fp16x2_t v = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(v);
  }
}

SGL_DEVICE void load_matrices(uint32_t (&a)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address)
               : "memory");
}

SGL_DEVICE void load_transposed(uint32_t (&a)[4], uint32_t shared_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address)
               : "memory");
}

SGL_DEVICE uint32_t transposed(uint32_t matrix) {
  uint32_t v;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(v) : "r"(matrix));
  return v;
}

SGL_DEVICE void copy_async_16_or_zero(uint32_t shared_address, const void* address, bool copy) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(address), "r"(copy ? 16 : 0)
               : "memory");
}

SGL_DEVICE float max_over_rows(float v) {  // lanes of equal column of a product
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) v = fmaxf(v, __shfl_xor_sync(0xffffffff, v, offset));
  return v;
}

// Attention to some tokens, for heads 2 (lane % 4) and the next: of `out`, fragments of the product [head_dim, heads], so many, and
// not yet divided by the sum of weights.
template <int kFragments>
struct State {
  static constexpr int kNumbers = 4 + 4 * kFragments;
  float most[2], sum[2];  // of sum, this lane's share
  float out[kFragments][4];

  SGL_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < 2; ++j) most[j] = -INFINITY, sum[j] = 0;
#pragma unroll
    for (int d = 0; d < kFragments; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[d][i] = 0;
  }

  // Prepares for tokens whose largest score is `score`.
  SGL_DEVICE void raise(int j, float score, float scale) {
    const float now = fmaxf(most[j], score);
    const float keep = now == -INFINITY ? 1.f : exp2f((most[j] - now) * scale);
    most[j] = now, sum[j] *= keep;
#pragma unroll
    for (int d = 0; d < kFragments; ++d) out[d][j] *= keep, out[d][j + 2] *= keep;
  }

  // Adds other tokens' state; `at(i)` is its i-th number, in the order of `save`.
  template <typename At>
  SGL_DEVICE void add(At at, float scale) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float theirs = at(j);
      raise(j, theirs, scale);
      const float keep = theirs == -INFINITY ? 0.f : exp2f((theirs - most[j]) * scale);
      sum[j] += at(2 + j) * keep;
#pragma unroll
      for (int d = 0; d < kFragments; ++d) {
        out[d][j] += at(4 + 4 * d + j) * keep;
        out[d][j + 2] += at(4 + 4 * d + j + 2) * keep;
      }
    }
  }

  template <typename To>
  SGL_DEVICE void save(To to) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) to(j, most[j]), to(2 + j, sum[j]);
#pragma unroll
    for (int d = 0; d < kFragments; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i) to(4 + 4 * d + i, out[d][i]);
  }
};

// A tile of a block's run. first_tile: of each request in the order of requests, if there were one KV head.
struct Tile {
  int request, head, tile, tiles;

  SGL_DEVICE Tile(int index, const int* first_tile, int requests, int heads_k) {
    int low = 0, high = requests - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first_tile[middle] * heads_k <= index) low = middle;
      else high = middle - 1;
    }
    request = low;
    tiles = first_tile[low + 1] - first_tile[low];
    const int rest = index - first_tile[low] * heads_k;
    head = rest / tiles, tile = rest % tiles;
  }

  SGL_DEVICE void next(const int* first_tile, int heads_k) {
    if (++tile < tiles) return;
    tile = 0;
    if (++head < heads_k) return;
    head = 0;
    ++request;
    tiles = first_tile[request + 1] - first_tile[request];
  }
};

template <int kHeadDim>
struct Shared {
  static constexpr int kFragments = kHeadDim / 16;
  static constexpr int kShare = kFragments / kWarps;  // of a warp, when states are added up
  static constexpr int kRowBytes = kHeadDim * 2;
  static constexpr int kStageBytes = 2 * kWarpTokens * kRowBytes;  // keys, then values
  static constexpr int kChunks = kRowBytes / 16;

  __align__(16) char ring[kWarps][kStages][kStageBytes];
  float states[kWarps][State<kFragments>::kNumbers][32];
  int first_tile[kMostRequests + 1];
  int lengths[kMostRequests];
  int rows[kMostRequests];
  int counts[kWarps], longest_of[kWarps], longest;
  bool is_last;

  // Rows of a stage are swizzled, so that eight rows of a chunk lie in different banks.
  static SGL_DEVICE int offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row % 8)) * 16); }
};

// first_tile[i] = tiles of the requests before i.
template <typename S>
SGL_DEVICE void read_requests(S& s, const Attention& p) {
  constexpr int kPerThread = kMostRequests / (32 * kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = threadIdx.x * kPerThread;
  int tiles[kPerThread] = {}, sum = 0, longest = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (begin + i >= p.requests) break;
    s.lengths[begin + i] = static_cast<int>(p.lengths[begin + i]);
    s.rows[begin + i] = static_cast<int>(p.rows[begin + i]);
    tiles[i] = (s.lengths[begin + i] + kTileTokens - 1) / kTileTokens;
    sum += tiles[i];
    longest = max(longest, tiles[i]);
  }
  longest = __reduce_max_sync(0xffffffff, longest);
  int before = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int v = __shfl_up_sync(0xffffffff, before, offset);
    if (lane >= offset) before += v;
  }
  if (lane == 31) s.counts[warp] = before, s.longest_of[warp] = longest;
  before -= sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before += s.counts[w];
  if (threadIdx.x == 0) {
    s.first_tile[0] = 0, s.longest = 0;
    for (int w = 0; w < kWarps; ++w) s.longest = max(s.longest, s.longest_of[w]);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    before += tiles[i];
    if (begin + i < p.requests) s.first_tile[begin + i + 1] = before;
  }
  __syncthreads();
}

// An even share; where that costs no multiprocessor more, whole runs, which need not be added up. longest: tiles of a run.
SGL_DEVICE int tiles_of_a_block(int total, int longest) {
  const int blocks = gridDim.x, even = (total + blocks - 1) / blocks;
  const int whole = (even + longest - 1) / longest * longest;
  if (whole * 16 <= even * 17) return whole;
  if (longest <= 2 * even && total <= longest * (blocks / kBlocks)) return longest;
  return even;
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) decode_attention_kernel(const __grid_constant__ Attention p) {
  using S = Shared<kHeadDim>;
  using Share = State<S::kShare>;
  extern __shared__ __align__(16) char shared[];
  S& s = *reinterpret_cast<S*>(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  device::PDLTriggerSecondary<true>();

  read_requests(s, p);
  const int total = s.first_tile[p.requests] * p.heads_k;
  const int per_block = tiles_of_a_block(total, s.longest);
  const int begin = min(int(blockIdx.x) * per_block, total), end = min(begin + per_block, total);
  if (begin == end) {
    device::PDLWaitPrimary<true>();
    return;
  }

  // Copies of tiles run ahead of the products, their KV slots one more tile.
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(s.ring[warp]));
  Tile ahead(begin, s.first_tile, p.requests, p.heads_k);
  int left = end - begin, into = 0, slot = 0;
  const auto look_up = [&] {
    const int token = ahead.tile * kTileTokens + warp * kWarpTokens + lane % kWarpTokens;
    slot = left && token < s.lengths[ahead.request] ? p.req_to_token[s.rows[ahead.request] * p.row_stride + token] : -1;
  };
  const auto has_last_token = [&] {
    return left && (s.lengths[ahead.request] - 1) / kWarpTokens == ahead.tile * kWarps + warp;
  };
  const auto copy = [&] {
    if (left) {
      constexpr int kRowsAtOnce = 32 / S::kChunks;
      const int chunk = lane % S::kChunks;
      const uint32_t stage = ring + into * S::kStageBytes;
#pragma unroll
      for (int i = 0; i < kWarpTokens / kRowsAtOnce; ++i) {
        const int row = i * kRowsAtOnce + lane / S::kChunks;
        const int from = __shfl_sync(0xffffffff, slot, row);
        const int64_t at = (int64_t(max(from, 0)) * p.heads_k + ahead.head) * S::kRowBytes + chunk * 16;
        const uint32_t to = stage + S::offset(row, chunk);
        copy_async_16_or_zero(to, static_cast<const char*>(p.k_cache) + at, from >= 0);
        copy_async_16_or_zero(to + S::kStageBytes / 2, static_cast<const char*>(p.v_cache) + at, from >= 0);
      }
      into = into + 1 == kStages ? 0 : into + 1;
      if (--left) ahead.next(s.first_tile, p.heads_k);
      look_up();
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  look_up();
  int copied = 0;
  for (; copied < kStages - 1 && !has_last_token(); ++copied) copy();
  device::PDLWaitPrimary<true>();
  for (; copied < kStages - 1; ++copied) copy();

  const int group = p.heads_q / p.heads_k;
  uint32_t q[S::kFragments][2];
  const auto load_q = [&](const Tile& of) {
    const int head = lane / 4;
    const auto* from = static_cast<const T*>(p.q) + (int64_t(of.request) * p.heads_q + of.head * group + head) * kHeadDim;
#pragma unroll
    for (int d = 0; d < S::kFragments; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* pair = reinterpret_cast<const uint32_t*>(from + d * 16 + half * 8 + lane % 4 * 2);
        q[d][half] = head < group ? __ldcg(pair) : 0;
      }
    }
  };

  Tile now(begin, s.first_tile, p.requests, p.heads_k);
  load_q(now);
  State<S::kFragments> state;
  state.clear();
  int stage = 0;
  for (int index = begin; index < end; ++index) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncwarp();
    const uint32_t keys = ring + stage * S::kStageBytes, values = keys + S::kStageBytes / 2;
    const int here = s.lengths[now.request] - now.tile * kTileTokens - warp * kWarpTokens;  // tokens of this warp
    stage = stage + 1 == kStages ? 0 : stage + 1;
    copy();

    float scores[4] = {};
#pragma unroll
    for (int d = 0; d < S::kFragments; ++d) {
      uint32_t k[4];
      load_matrices(k, keys + S::offset(lane % 16, 2 * d + lane / 16));
      multiply_add<T>(scores, k, q[d][0], q[d][1]);
    }
    float weights[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (lane / 4 >= here) scores[j] = -INFINITY;
      if (lane / 4 + 8 >= here) scores[j + 2] = -INFINITY;
      state.raise(j, max_over_rows(fmaxf(scores[j], scores[j + 2])), p.scale);
      const float most = state.most[j] == -INFINITY ? 0.f : state.most[j];
      weights[j] = exp2f((scores[j] - most) * p.scale);
      weights[j + 2] = exp2f((scores[j + 2] - most) * p.scale);
      state.sum[j] += weights[j] + weights[j + 2];
    }
    const uint32_t b0 = transposed(pack2<T>(weights[0], weights[1])), b1 = transposed(pack2<T>(weights[2], weights[3]));
#pragma unroll
    for (int d = 0; d < S::kFragments; ++d) {
      uint32_t v[4];
      load_transposed(v, values + S::offset(lane % 8 + lane / 16 * 8, 2 * d + lane / 8 % 2));
      multiply_add<T>(state.out[d], v, b0, b1);
    }
    __syncwarp();  // the stage may be overwritten

    if (now.tile + 1 < now.tiles && index + 1 < end) {
      ++now.tile;
      continue;
    }
    const Tile run = now;
    if (index + 1 < end) {
      now.next(s.first_tile, p.heads_k);
      load_q(now);  // arrives while this run is added up
    }
    // The four warps' states become one, of which each warp has its share.
    __syncthreads();  // all have read those of the run before
    state.save([&](int i, float v) { s.states[warp][i][lane] = v; });
    state.clear();
    __syncthreads();
    Share share;
    share.clear();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      share.add([&](int i) { return s.states[w][i < 4 ? i : i + warp * 4 * S::kShare][lane]; }, p.scale);
    }
    const int run_begin = s.first_tile[run.request] * p.heads_k + run.head * run.tiles, run_end = run_begin + run.tiles;
    const int first_block = run_begin / per_block, last_block = (run_end - 1) / per_block;
    if (first_block < last_block) {
      const auto part = [&](int block) {  // a run that begins inside a block is its last one, any other its first
        const int place = block * 2 + (block * per_block < run_begin);
        return p.parts + (int64_t(place) * kWarps + warp) * Share::kNumbers * 32 + lane;
      };
      share.save([to = part(blockIdx.x)](int i, float v) { __stcg(to + i * 32, v); });
      int* arrivals = p.arrivals + run.request * p.heads_k + run.head;
      __threadfence();
      __syncthreads();
      if (threadIdx.x == 0) s.is_last = atomicAdd(arrivals, 1) == last_block - first_block;
      __syncthreads();
      if (!s.is_last) continue;
      __threadfence();
      if (threadIdx.x == 0) *arrivals = 0;
      share.clear();
#pragma unroll 8
      for (int block = first_block; block <= last_block; ++block) {
        const float* from = part(block);
        float numbers[Share::kNumbers];
#pragma unroll
        for (int i = 0; i < Share::kNumbers; ++i) numbers[i] = __ldcg(from + i * 32);
        share.add([&](int i) { return numbers[i]; }, p.scale);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = share.sum[j];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
      const int head = lane % 4 * 2 + j;
      if (head >= group) continue;
      auto* to = static_cast<T*>(p.out) + (int64_t(run.request) * p.heads_q + run.head * group + head) * kHeadDim;
#pragma unroll
      for (int d = 0; d < S::kShare; ++d) {
        const int column = (warp * S::kShare + d) * 16 + lane / 4;
        to[column] = static_cast<T>(share.out[d][j] / sum);
        to[column + 8] = static_cast<T>(share.out[d][j + 2] / sum);
      }
    }
  }
}

template <typename T>
struct DecodeAttention {
  template <int kHeadDim>
  static void launch(const Attention& p, int blocks, cudaStream_t stream) {
    constexpr auto kernel = decode_attention_kernel<T, kHeadDim>;
    constexpr int kBytes = sizeof(Shared<kHeadDim>);
    static const auto allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    host::RuntimeDeviceCheck(allowed);
    host::LaunchKernel(blocks, 32 * kWarps, stream, kBytes).enable_pdl()(kernel, p);
  }

  // parts and arrivals: see Attention.
  static void
  run(tvm::ffi::TensorView q,
      tvm::ffi::TensorView k_cache,
      tvm::ffi::TensorView v_cache,
      tvm::ffi::TensorView req_to_token,
      tvm::ffi::TensorView rows,
      tvm::ffi::TensorView lengths,
      tvm::ffi::TensorView out,
      tvm::ffi::TensorView parts,
      tvm::ffi::TensorView arrivals,
      double scale) {
    using namespace host;
    auto B = SymbolicSize{"requests"}, Q = SymbolicSize{"heads of q"}, K = SymbolicSize{"heads of k"}, D = SymbolicSize{"head_dim"};
    auto row_stride = SymbolicSize{"row stride of req_to_token"}, blocks = SymbolicSize{"blocks"}, counters = SymbolicSize{"arrivals"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({B, Q, D}).with_dtype<T>().with_device(device).verify(q).verify(out);
    TensorMatcher({-1, K, D}).with_dtype<T>().with_device(device).verify(k_cache).verify(v_cache);
    TensorMatcher({-1, -1}).with_strides({row_stride, 1}).with_dtype<int32_t>().with_device(device).verify(req_to_token);
    TensorMatcher({B}).with_dtype<int64_t>().with_device(device).verify(rows).verify(lengths);
    const int head_dim = D.unwrap();
    TensorMatcher({blocks, 2, kWarps, 4 + head_dim / 4 / kWarps, 32}).with_dtype<float>().with_device(device).verify(parts);
    TensorMatcher({counters}).with_dtype<int32_t>().with_device(device).verify(arrivals);
    const Attention p{
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        out.data_ptr(),
        static_cast<const int32_t*>(req_to_token.data_ptr()),
        static_cast<const int64_t*>(rows.data_ptr()),
        static_cast<const int64_t*>(lengths.data_ptr()),
        static_cast<float*>(parts.data_ptr()),
        static_cast<int*>(arrivals.data_ptr()),
        row_stride.unwrap(),
        static_cast<int>(B.unwrap()),
        static_cast<int>(Q.unwrap()),
        static_cast<int>(K.unwrap()),
        static_cast<float>(scale * 1.4426950408889634)};
    RuntimeCheck(head_dim == 64 || head_dim == 128, "unsupported head_dim ", head_dim);
    RuntimeCheck(p.heads_q % p.heads_k == 0 && p.heads_q / p.heads_k <= kHeads, "unsupported heads ", p.heads_q, " and ", p.heads_k);
    RuntimeCheck(1 <= p.requests && p.requests <= kMostRequests, "unsupported number of requests ", p.requests);
    RuntimeCheck(p.requests * p.heads_k <= counters.unwrap(), "too few arrivals for ", p.requests, " requests");
    const auto stream = LaunchKernel::resolve_device(device.unwrap());
    (head_dim == 64 ? launch<64> : launch<128>)(p, blocks.unwrap(), stream);
  }
};

}  // namespace er_sglang
