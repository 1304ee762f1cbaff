// What lies between two layers' attentions, in one kernel, for up to 8 rows: o, residual + RMSNorm, gate_up with its activation,
// down, residual + RMSNorm, and the next layer's qkv. bf16, W_hat in Marlin's int4 layout, symmetric, groups of 128.
//
// The floor is the weights' bytes over the memory bandwidth. Kernel by kernel, memory idles at each product's end and start; here far
// less:
//
// - A block on every multiprocessor stays for all four products. Four of its warps do nothing but fill rings in shared memory with
//   what the eight others multiply next (layer_rings.cuh), across the products' ends: weights do not depend on what is computed.
// - K is cut into strips, each with as many of the blocks. Pieces of a strip, 64 columns of 128 of K (4 KB), are shared out evenly,
//   column after column, first over its blocks, then over warps (layer_products.cuh). A block sends what it has of a column to the
//   block that finishes it (layer_sums.cuh); this one sends the result to all that read it. From one product to the next that takes
//   5 us, of 8 rows 5 to 8, while rings fill.
// - No more is requested at a time than memory needs to be busy, and half of it while blocks hand each other sums: what they send
//   would have to wait behind it. Requested as early as there is room, a layer takes 11 to 14 % more time (H100, one row).
// - x is multiplied as float16, which bf16 fits but for its range: beyond 65504 it is that, and below .001 it loses bits. Two of four
//   shifts that codes would need are saved (as_operands, multiply), and all subtractions of zero points.
// - The root mean square of the norm before a product is a factor of its rows: sums are divided by it, when the squares have arrived.
//   The norm's weight is part of x.
// - The first weights of the next launch go to L2 while the last product is multiplied, which leaves memory idle.
//
// Every sum has a fixed order, hence the same bits every time. All blocks must run at once, one on each multiprocessor: what else the
// GPU does must end by itself. Two such kernels at once, as of two servers under MPS, would wait for each other until `receive` gives up.
//
// Before the grid dependency only the filling warps read, and only weights: see small_kernels.cuh for why this is safe. They do not wait
// for it themselves; the block ends after those that do.
#pragma once

#include <sgl_kernel/tensor.h>
#include <sgl_kernel/utils.h>

#include <sgl_kernel/utils.cuh>

#include <tvm/ffi/container/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "copy_engine.cuh"
#include "exchange.cuh"
#include "int4.cuh"
#include "layer_products.cuh"
#include "layer_rings.cuh"
#include "layer_sums.cuh"
#include "mma.cuh"

namespace er_sglang {

constexpr int kLogMultiplying = 8, kMultiplying = 1 << kLogMultiplying;
static_assert(kMultiplying == 32 * kWarps);
constexpr int kThreads = kMultiplying + 32 * kGroups;
constexpr int kLooksX = 5;  // vectors of x that a lane looks at at once
constexpr int kSharedBytes = 227 * 1024;

SGL_DEVICE void multiplying_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory"); }

// Where 16 bytes of a row of a unit of x are, in shared memory: ldmatrix, which reads the same of all rows, meets no bank twice.
SGL_DEVICE int chunk_at(int chunk, int row) { return chunk ^ row; }

// x of a strip to shared memory, [units][m][kRowX bytes]. Threads are shared out over rows, some warps for each.
SGL_DEVICE void get_x(const Layer& p, const Step& s, const Step& before, char* shared_x, int strip, int turn) {
  constexpr int kChunks = kUnitK / 8;  // of a row of a unit
  const int log_threads = kLogMultiplying - p.log_rows, threads = 1 << log_threads, chunks = s.strip.value * kChunks;
  const int row = threadIdx.x >> log_threads, mine = threadIdx.x & (threads - 1);
  if (row >= p.m) return;
  uint4* const from = (s.x ? reinterpret_cast<uint4*>(s.x + int64_t(row) * s.x_stride)
                           : reinterpret_cast<uint4*>(before.sent + turn) + row * s.units * kChunks) +
                      strip * chunks;
  for (int first = 0; first < chunks; first += threads * kLooksX) {
    const auto chunk = [&](int i) { return first + i * threads + mine; };
    uint4* at[kLooksX];
    uint4 v[kLooksX];
#pragma unroll
    for (int i = 0; i < kLooksX; ++i) at[i] = from + min(chunk(i), chunks - 1);
    if (s.x) {
#pragma unroll
      for (int i = 0; i < kLooksX; ++i) v[i] = as_operands(__ldcg(at[i]), chunk(i) % 2);
    } else {
      receive(v, at);
    }
#pragma unroll
    for (int i = 0; i < kLooksX; ++i) {
      if (chunk(i) >= chunks) continue;
      const int unit = chunk(i) / kChunks;
      reinterpret_cast<uint4*>(shared_x + (unit * p.m + row) * kRowX)[chunk_at(chunk(i) % kChunks, row)] = v[i];
    }
  }
}

// What the launch before handed on is taken back: the next one will send there.
SGL_DEVICE void take_back_all(const Layer& p, uint32_t launch) {
  uint4* const old = p.sent + (launch & 1 ? 0 : p.sent_vectors);
  for (int i = blockIdx.x * kMultiplying + threadIdx.x; i < p.sent_vectors; i += gridDim.x * kMultiplying) take_back(old + i);
}

// sum += W_hat's piece @ x's unit, 64 columns by 8 rows. `fragments`: what the lane reads first, of two tiles.
SGL_DEVICE void multiply(float (&sum)[4][4], uint32_t piece, uint32_t fragments) {
  const int lane = threadIdx.x % 32;
  const auto load = [](uint32_t from) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from));
    return v;
  };
  const uint4 scales = load(piece + kUnitTiles * kTileBytes + lane / 4 * 16);
  uint4 codes[kUnitTiles];
#pragma unroll
  for (int t = 0; t < kUnitTiles; ++t) codes[t] = load(piece + t * kTileBytes + lane * 16);
  // Codes become 1024 + code and, where x is a sixteenth, 1024 + 16 * code: without a shift for those. What is too much is one more
  // product, of a constant.
  float part[4][4] = {}, too_much[4] = {};
  constexpr uint32_t kTooMuch[4] = {0xe408e408, 0xe408e408, 0xe480e480, 0xe480e480};  // -1032 and -1152
  uint32_t b[4];
#pragma unroll
  for (int t = 0; t < kUnitTiles; ++t) {
    const uint32_t q[4] = {codes[t].x, codes[t].y, codes[t].z, codes[t].w};
    if (t % 2 == 0) load_x_fragments(b, fragments ^ t * kTileK * sizeof(fp16_t));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t a[4] = {
          magic_codes<fp16_t>(q[w]), magic_codes<fp16_t>(q[w] >> 8), magic_codes_16<fp16_t>(q[w]), magic_codes_16<fp16_t>(q[w] >> 8)};
      multiply_add<fp16_t>(part[w], a, b[t % 2 * 2], b[t % 2 * 2 + 1]);
    }
    multiply_add<fp16_t>(too_much, kTooMuch, b[t % 2 * 2], b[t % 2 * 2 + 1]);
  }
  const bf16_t* scale = reinterpret_cast<const bf16_t*>(&scales);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[w][i] += static_cast<float>(scale[2 * w + i / 2]) * (part[w][i] + too_much[i]);
  }
}

// A warp's pieces of a product. What it has of a column that it leaves goes to `first_parts`, the rest remains in `sum`: it has pieces
// of two columns at most.
SGL_DEVICE void multiply_all(
    const Layer& p, const Step& s, const Ring& ring, Stage& stage, const BlockShare& block, float (&sum)[4][4], uint32_t shared_x, float* first_parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Share mine = block.of_warp(warp);
  const int strip_units = s.strip.value;
  int unit = mine.begin - s.strip.divide(mine.begin) * strip_units;
  const int row = min(lane % 8, p.m - 1);
  const uint32_t fragments = shared_x + row * kRowX + chunk_at(lane / 8, row) * 16;
  for (int round = 0; round < block.rounds(); ++round, stage.advance(p.stages)) {
    barrier_wait(ring.full + 8 * stage.index, stage.parity);
    const bool exists = round < mine.size();
    if (exists) multiply(sum, ring.pieces + stage.index * kStageBytes + warp % kGroup * kPieceBytes, fragments + unit * p.m * kRowX);
    __syncwarp();
    if (lane == 0) barrier_arrive(ring.empty + 8 * stage.index);
    if (!exists) continue;
    if (++unit < strip_units) continue;
    unit = 0;
    store_parts(first_parts + warp * p.m * kRowPart, sum, p.m);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[w][i] = 0;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) fused_layer_kernel(const __grid_constant__ Layer p) {
  extern __shared__ __align__(kRowX) char shared[];
  Head& head = *reinterpret_cast<Head*>(shared);
  char* const shared_x = shared + kHeadBytes + kGroups * p.stages * kStageBytes;
  float* const last_parts = reinterpret_cast<float*>(shared_x);
  float* const first_parts = reinterpret_cast<float*>(shared_x + p.x_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool fills = warp >= kWarps;
  const int group = fills ? warp - kWarps : warp / kGroup;
  const Ring ring(shared, group, p.stages);

  device::PDLTriggerSecondary<true>();
  for (int i = threadIdx.x; i < int(sizeof(p.steps) / 4); i += kThreads) {
    reinterpret_cast<uint32_t*>(head.steps)[i] = reinterpret_cast<const uint32_t*>(p.steps)[i];
  }
  if (fills && lane < p.stages) barrier_init(ring.full + 8 * lane, 1), barrier_init(ring.empty + 8 * lane, kGroup);
  if (threadIdx.x == 0) head.handing = 0;
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  if (fills) return fill(p, head, ring, group);

  device::PDLWaitPrimary<true>();
  const uint32_t launch = __ldcg(p.launch);
  const int turn = (launch & 1) * p.sent_vectors * 4;  // where this launch's `sent` and `squares` are
  Stage stage;
  for (int step = 0; step < kSteps; ++step) {
    const Step &s = head.steps[step], &before = head.steps[max(step - 1, 0)];
    const BlockShare block(s);
    get_x(p, s, before, shared_x, block.strip, turn);
    if (step == 0) take_back_all(p, launch);
    multiplying_sync();
    if (threadIdx.x == 0) head.handing = 0;

    float sum[4][4] = {};
    multiply_all(p, s, ring, stage, block, sum, __cvta_generic_to_shared(shared_x), first_parts);
    if (threadIdx.x == 0) head.handing = 1;
    multiplying_sync();  // x is no longer needed
    store_parts(last_parts + warp * p.m * kRowPart, sum, p.m);
    multiplying_sync();
    send_sums(p, s, block, first_parts, last_parts);
    finish(p, s, step > 0 && before.residual ? &before : nullptr, turn);
    multiplying_sync();  // the parts are no longer needed
  }
  // All blocks know the number: block 0 finishes an output of gate_up, whose norm has squares of all of o, and so sums of every block.
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.launch = launch + 1;
}

struct FusedLayer {
  static Divisor divisor(int value) {
    host::RuntimeCheck(value > 1, "too small a product");
    return {uint32_t(value), uint32_t((0x100000000 + value - 1) / value)};
  }

  // Without what is read and written but the weights.
  static Step step(tvm::ffi::TensorView codes, tvm::ffi::TensorView scales, int64_t k, int halves, int64_t strips, int64_t blocks, DLDevice on) {
    using namespace host;
    auto N = SymbolicSize{"N"}, G = SymbolicSize{"K / 128"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({G, N}).with_dtype<bf16_t>().with_device(device).verify(scales);
    TensorMatcher({G.unwrap() * kUnitTiles, 2 * N.unwrap()}).with_dtype<int32_t>().with_device(device).verify(codes);
    Step s{};
    s.n = N.unwrap(), s.units = G.unwrap(), s.halves = halves, s.parts = strips * halves * 2;
    RuntimeCheck(device.unwrap().device_id == on.device_id, "weights are on another device");
    RuntimeCheck(s.units * kUnitK == k, "W_hat has ", s.units * kUnitK, " columns, x has ", k);
    RuntimeCheck(s.n % (kTileN * halves) == 0 && strips > 0 && s.units % strips == 0 && s.parts <= kMostParts, "cannot share out ", s.n, " x ", k, " in ", strips, " strips");
    RuntimeCheck(blocks % strips == 0, "cannot share ", strips, " strips out over ", blocks, " blocks");
    const int pieces = s.units / strips * (s.n / kTileN), blocks_of_strip = blocks / strips;
    s.codes = static_cast<const char*>(codes.data_ptr()), s.scales = static_cast<const char*>(scales.data_ptr());
    s.blocks = divisor(blocks_of_strip), s.each = pieces / blocks_of_strip, s.more = pieces % blocks_of_strip;
    s.strip = divisor(s.units / strips), s.outputs = s.n / kTileN / halves;
    s.by_each = divisor(s.each), s.by_one_more = divisor(s.each + 1);
    RuntimeCheck(s.each >= s.units / strips, "a column would have three parts: ", s.n, " x ", k, " in ", strips, " strips");
    RuntimeCheck((s.each + (s.more > 0) + kWarps - 1) / kWarps <= s.units / strips, "a warp would have three columns: ", s.n, " x ", k, " in ", strips, " strips");
    return s;
  }

  // Products: o, gate_up and down of a layer, qkv, o and gate_up of the next one. residual is updated in place; y is qkv's.
  // scratch: int32, all bits set at first; nothing else may change it.
  static void
  run(tvm::ffi::TensorView x,
      tvm::ffi::TensorView residual,
      tvm::ffi::TensorView first_norm,
      tvm::ffi::TensorView second_norm,
      tvm::ffi::TensorView bias,  // may be empty
      tvm::ffi::TensorView y,
      tvm::ffi::TensorView o_codes,
      tvm::ffi::TensorView o_scales,
      tvm::ffi::TensorView gate_up_codes,
      tvm::ffi::TensorView gate_up_scales,
      tvm::ffi::TensorView down_codes,
      tvm::ffi::TensorView down_scales,
      tvm::ffi::TensorView qkv_codes,
      tvm::ffi::TensorView qkv_scales,
      tvm::ffi::TensorView next_o_codes,
      tvm::ffi::TensorView next_o_scales,
      tvm::ffi::TensorView next_gate_up_codes,
      tvm::ffi::TensorView next_gate_up_scales,
      tvm::ffi::TensorView scratch,
      double eps,
      int64_t blocks,
      int64_t o_strips,
      int64_t gate_up_strips,
      int64_t down_strips,
      int64_t qkv_strips,
      int64_t rounds_ahead) {
    using namespace host;
    auto M = SymbolicSize{"M"}, K = SymbolicSize{"K of o"}, H = SymbolicSize{"hidden size"}, N = SymbolicSize{"N of qkv"};
    auto I = SymbolicSize{"K of down / 128"}, S = SymbolicSize{"scratch"}, stride = SymbolicSize{"row stride of x"};
    auto device = SymbolicDevice{};
    device.set_options<kDLCUDA>();
    TensorMatcher({M, K}).with_strides({stride, 1}).with_dtype<bf16_t>().with_device(device).verify(x);
    TensorMatcher({M, H}).with_dtype<bf16_t>().with_device(device).verify(residual);
    TensorMatcher({H}).with_dtype<bf16_t>().with_device(device).verify(first_norm).verify(second_norm);
    TensorMatcher({M, N}).with_dtype<bf16_t>().with_device(device).verify(y);
    if (bias.size(0)) TensorMatcher({N}).with_dtype<bf16_t>().with_device(device).verify(bias);
    TensorMatcher({I, H}).with_dtype<bf16_t>().with_device(device).verify(down_scales);
    TensorMatcher({S}).with_dtype<int32_t>().with_device(device).verify(scratch);
    RuntimeCheck(stride.unwrap() % 8 == 0, "rows of x are not aligned to 16 bytes");
    const int64_t hidden = H.unwrap(), intermediate = I.unwrap() * kUnitK;
    const auto on = device.unwrap();

    Layer layer{};
    layer.m = M.unwrap(), layer.eps = eps, layer.rounds_ahead = rounds_ahead;
    RuntimeCheck(1 <= layer.m && layer.m <= kMostRows, "unsupported number of rows ", layer.m);
    while (1 << layer.log_rows < layer.m) ++layer.log_rows;
    layer.log_pairs = std::max(layer.log_rows - 1, 0);
    auto& [o, gate_up, down, qkv, next_o, next_gate_up] = layer.steps;
    o = step(o_codes, o_scales, K.unwrap(), 1, o_strips, blocks, on);
    gate_up = step(gate_up_codes, gate_up_scales, hidden, 2, gate_up_strips, blocks, on);
    down = step(down_codes, down_scales, intermediate, 1, down_strips, blocks, on);
    qkv = step(qkv_codes, qkv_scales, hidden, 1, qkv_strips, blocks, on);
    next_o = step(next_o_codes, next_o_scales, K.unwrap(), 1, o_strips, blocks, on);
    next_gate_up = step(next_gate_up_codes, next_gate_up_scales, hidden, 2, gate_up_strips, blocks, on);
    RuntimeCheck(o.n == hidden && down.n == hidden && gate_up.n == 2 * intermediate && qkv.n == N.unwrap(), "these products do not follow each other");
    RuntimeCheck(hidden / kTileN <= kMostOutputs, "too wide a norm: ", hidden);
    o.x = static_cast<bf16_t*>(x.data_ptr()), o.x_stride = stride.unwrap();
    o.residual = down.residual = static_cast<bf16_t*>(residual.data_ptr());
    o.norm = static_cast<const bf16_t*>(first_norm.data_ptr()), down.norm = static_cast<const bf16_t*>(second_norm.data_ptr());
    qkv.bias = bias.size(0) ? static_cast<const bf16_t*>(bias.data_ptr()) : nullptr;
    qkv.y = static_cast<bf16_t*>(y.data_ptr());

    int* free = static_cast<int*>(scratch.data_ptr());
    const int* const end = free + S.unwrap();
    const auto take = [&free](int64_t words) { return std::exchange(free, free + words); };
    const int parts_bytes = kWarps * layer.m * kRowPart * sizeof(float);
    layer.x_bytes = parts_bytes;  // the last parts, in the same place
    layer.launch = reinterpret_cast<uint32_t*>(take(4));
    layer.sent = reinterpret_cast<uint4*>(free);
    for (int i = 0; i < kSteps; ++i) {
      Step& s = layer.steps[i];
      s.sent = reinterpret_cast<uint32_t*>(take(kMostRows * s.outputs * kTileN / 2));
      s.squares = reinterpret_cast<uint32_t*>(take(kMostRows * s.outputs));
      layer.x_bytes = std::max<int>(layer.x_bytes, s.strip.value * layer.m * kRowX);
    }
    layer.sent_vectors = reinterpret_cast<uint4*>(free) - layer.sent;
    take(4 * layer.sent_vectors);
    for (int i = 0; i < kSteps; ++i) {
      Step& s = layer.steps[i];
      s.inbox = reinterpret_cast<float*>(take(int64_t(s.outputs) * s.parts * layer.m * kTileN));
    }
    RuntimeCheck(free <= end, "too little scratch: ", free - end, " words are missing");
    layer.stages = std::min(kMostStages, (kSharedBytes - kHeadBytes - parts_bytes - layer.x_bytes) / (kGroups * kStageBytes));
    RuntimeCheck(layer.stages >= kInFlight, "no room for weights beside x");
    const int shared_bytes = kHeadBytes + kGroups * layer.stages * kStageBytes + parts_bytes + layer.x_bytes;
    static const auto allowed = cudaFuncSetAttribute(fused_layer_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    RuntimeDeviceCheck(allowed);
    LaunchKernel(blocks, kThreads, on, shared_bytes).enable_pdl()(fused_layer_kernel, layer);
  }
};

}  // namespace er_sglang
