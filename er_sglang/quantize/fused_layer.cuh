// What lies between two layers' attentions, in one kernel, for up to 8 rows: o, residual + RMSNorm, gate_up with its activation,
// down, residual + RMSNorm, and the next layer's qkv. bf16, W_hat in Marlin's int4 layout, symmetric, groups of 128.
//
// The floor is the weights' bytes over the memory bandwidth. Kernel by kernel, memory idles at each product's end and start; here far
// less:
//
// - A block on every multiprocessor stays for all four products. Four of its warps do nothing but fill rings in shared memory with
//   what the eight others multiply next, across the products' ends: weights do not depend on what is computed.
// - K is cut into strips, each with as many of the blocks. Pieces of a strip, 64 columns of 128 of K (4 KB), are shared out evenly,
//   column after column, first over its blocks, then over warps. A block sends what it has of a column to the block that finishes it;
//   this one sends the result to all that read it (exchange.cuh). From one product to the next that takes 5 us, of 8 rows 6 to 10,
//   while rings fill.
// - No more is requested at a time than memory needs to be busy, and half of it while blocks hand each other sums: what they send
//   would have to wait behind it. Requested as early as there is room, a layer takes 11 to 14 % more time (H100, one row).
// - The root mean square of the norm before a product is a factor of its rows: sums are divided by it, when the squares have arrived.
//   The norm's weight is part of x.
// - The first weights of the next launch go to L2 while the last product is multiplied, which leaves memory idle.
//
// Every sum has a fixed order, hence the same bits every time. All blocks must run at once, one on each multiprocessor: what else the
// GPU does must end by itself. Two such kernels at once, as of two servers under MPS, would wait for each other for ever.
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

#include "activation.cuh"
#include "copy_engine.cuh"
#include "exchange.cuh"
#include "int4.cuh"
#include "layer_products.cuh"
#include "mma.cuh"

namespace er_sglang {

constexpr int kGroup = 2;  // of the warps that multiply share a ring, which a warp of its own fills: a stage is a piece for each
constexpr int kGroups = kWarps / kGroup;
constexpr int kMultiplying = 32 * kWarps, kThreads = kMultiplying + 32 * kGroups;
constexpr int kFilling = kGroup * kUnitTiles;  // lanes, each copies a row of tiles
constexpr unsigned kFillingLanes = (1u << kFilling) - 1;
constexpr int kStageBytes = kGroup * kPieceBytes;
constexpr int kMostStages = 6;
constexpr int kInFlight = 2;  // stages of a ring; while blocks hand each other sums, 1

constexpr int kRowX = kUnitK * 2;        // bytes of a row of a unit of x
constexpr int kRowPart = kTileN + 4;     // floats
constexpr int kLooks = 4, kLooksX = 5;   // loads of a lane that are under way at once
constexpr int kSharedBytes = 227 * 1024;

struct Stage {  // walks over a ring's stages, again and again
  int index = 0, parity = 0;
  SGL_DEVICE void advance(int stages) {
    if (++index == stages) index = 0, parity ^= 1;
  }
};

// What lies at the start of shared memory. Behind it: rings, in one place x and then warps' last parts, and warps' first parts.
struct Head {
  Step steps[kSteps + kStepsAhead];  // from global memory, under load, each would cost a microsecond
  uint64_t full[kGroups][kMostStages], empty[kGroups][kMostStages];
  volatile int handing;  // whether blocks hand each other sums
};
constexpr int kHeadBytes = (sizeof(Head) + kRowX - 1) / kRowX * kRowX;
static_assert(kHeadBytes <= 2048 && kGroups * kStageBytes % kRowX == 0);  // blocks.py; rows of x are aligned

struct Ring {
  uint32_t pieces, full, empty;  // addresses in shared memory
  SGL_DEVICE Ring(const char* shared, int group, int stages)
      : pieces(__cvta_generic_to_shared(shared + kHeadBytes + group * stages * kStageBytes)),
        full(__cvta_generic_to_shared(reinterpret_cast<const Head*>(shared)->full[group])),
        empty(__cvta_generic_to_shared(reinterpret_cast<const Head*>(shared)->empty[group])) {}
};

SGL_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
  return v;
}

SGL_DEVICE void multiplying_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kMultiplying) : "memory"); }

SGL_DEVICE void to_l2(const char* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// The work of a warp that fills a ring.
SGL_DEVICE void fill(const Layer& p, const Head& head, const Ring& ring, int group) {
  const int lane = threadIdx.x % 32;
  if (lane >= kFilling) return;
  const int of_group = lane / kUnitTiles, tile = lane % kUnitTiles;
  Stage stage, freed, arrived, latest;
  int requested = 0, rounds_ahead = 0;
  for (int step = 0; step < kSteps + kStepsAhead; ++step) {
    const Step& s = head.steps[step];
    const BlockShare block(s);
    const Share warp = block.of_warp(group * kGroup + of_group);
    const int stride = s.n * 8;  // bytes of a row of tiles
    int index = s.strip.divide(warp.begin), unit_of_strip = warp.begin - index * s.strip.value, units_left = 0;
    const char *codes = nullptr, *scales = nullptr;
    for (int round = 0; round < block.rounds(); ++round) {
      if (units_left == 0) {
        const Column column(s, index++);
        const int unit = block.strip * s.strip.value + unit_of_strip;
        units_left = s.strip.value - unit_of_strip, unit_of_strip = 0;
        codes = s.codes + (int64_t(unit) * kUnitTiles + tile) * stride + column.tile(s) * kTileBytes;
        scales = s.scales + int64_t(unit) * s.n * sizeof(bf16_t) + column.tile(s) * kScalesBytes;
      }
      const bool exists = round < warp.size();
      if (step < kSteps) {
        if (requested >= p.stages) barrier_wait(ring.empty + 8 * freed.index, freed.parity), freed.advance(p.stages);
        if (requested >= kInFlight) barrier_wait(ring.full + 8 * arrived.index, arrived.parity), arrived.advance(p.stages);
        if (requested > 0) {
          if (head.handing) barrier_wait(ring.full + 8 * latest.index, latest.parity);
          latest.advance(p.stages);
        }
        ++requested;
        const uint32_t barrier = ring.full + 8 * stage.index;
        const int pieces = __popc(__ballot_sync(kFillingLanes, exists)) / kUnitTiles;
        if (lane == 0) barrier_expect(barrier, pieces * kPieceBytes);
        __syncwarp(kFillingLanes);
        if (exists) {
          const uint32_t to = ring.pieces + stage.index * kStageBytes + of_group * kPieceBytes;
          copy_weights(to + tile * kTileBytes, codes, kTileBytes, barrier);
          if (tile == 0) copy_weights(to + kUnitTiles * kTileBytes, scales, kScalesBytes, barrier);
        }
        stage.advance(p.stages);
      } else {
        if (rounds_ahead++ == p.rounds_ahead) return;
        if (rounds_ahead == 1) barrier_wait(ring.full + 8 * latest.index, latest.parity);
        if (exists) {
          to_l2(codes, kTileBytes);
          if (tile == 0) to_l2(scales, kScalesBytes);
        }
      }
      codes += int64_t(kUnitTiles) * stride, scales += s.n * sizeof(bf16_t);
      --units_left;
    }
  }
}

// Where 16 bytes of a row of a unit of x are, in shared memory: ldmatrix, which reads the same of all rows, meets no bank twice.
SGL_DEVICE int chunk_at(int chunk, int row) { return chunk ^ row; }

// x of a strip to shared memory, [units][m][kRowX bytes].
SGL_DEVICE void read_x(const Layer& p, const Step& s, char* shared_x, int strip) {
  const int begin = strip * s.strip.value;
  for (int i = threadIdx.x; i < s.strip.value * (kUnitK / 8); i += kMultiplying) {
    const int unit = i / (kUnitK / 8), chunk = i % (kUnitK / 8);
    uint4 v[kMostRows];
#pragma unroll
    for (int row = 0; row < kMostRows; ++row) {
      if (row < p.m) v[row] = __ldcg(reinterpret_cast<const uint4*>(s.x + int64_t(row) * s.x_stride + (begin + unit) * kUnitK) + chunk);
    }
#pragma unroll
    for (int row = 0; row < kMostRows; ++row) {
      if (row < p.m) reinterpret_cast<uint4*>(shared_x + (unit * p.m + row) * kRowX)[chunk_at(chunk, row)] = v[row];
    }
  }
}

SGL_DEVICE void receive_x(const Layer& p, const Step& s, const Step& before, char* shared_x, int strip, uint32_t launch) {
  const int lane = threadIdx.x % 32, vectors = s.units * kUnitK / 4;  // of a row
  const int begin = strip * s.strip.value, tasks = s.strip.value << p.log_rows, row = threadIdx.x / 32 & ((1 << p.log_rows) - 1);  // a warp's tasks are of the same row
  if (row >= p.m) return;
  for (int first = threadIdx.x / 32; first < tasks; first += kWarps * kLooksX) {
    const auto unit = [&](int i) { return (first + i * kWarps) >> p.log_rows; };
    const Two* at[kLooksX];
#pragma unroll
    for (int i = 0; i < kLooksX; ++i) {
      const int known = first + i * kWarps < tasks ? i : 0;
      at[i] = reinterpret_cast<const Two*>(before.sent) + row * vectors + (begin + unit(known)) * 32 + lane;
    }
    Two v[kLooksX];
    receive(v, at, launch);
#pragma unroll
    for (int i = 0; i < kLooksX; ++i) {
      if (first + i * kWarps < tasks) {
        const int at_8_bytes = 2 * chunk_at(lane / 2, row) + lane % 2;
        reinterpret_cast<uint2*>(shared_x + (unit(i) * p.m + row) * kRowX)[at_8_bytes] = {v[i].a.data, v[i].b.data};
      }
    }
  }
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
  float part[4][4] = {};
  uint32_t b[4], zero[2];
  magic_zeros<bf16_t, true>(zero, 0, 0);
#pragma unroll
  for (int t = 0; t < kUnitTiles; ++t) {
    const uint32_t q[4] = {codes[t].x, codes[t].y, codes[t].z, codes[t].w};
    if (t % 2 == 0) load_x_fragments(b, fragments ^ t * kTileK * sizeof(bf16_t));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      uint32_t a[4];
      a[0] = subtract2<bf16_t>(magic_codes<bf16_t>(q[w]), zero[0]);
      a[1] = subtract2<bf16_t>(magic_codes<bf16_t>(q[w] >> 8), zero[1]);
      a[2] = subtract2<bf16_t>(magic_codes<bf16_t>(q[w] >> 4), zero[0]);
      a[3] = subtract2<bf16_t>(magic_codes<bf16_t>(q[w] >> 12), zero[1]);
      multiply_add<bf16_t>(part[w], a, b[t % 2 * 2], b[t % 2 * 2 + 1]);
    }
  }
  const bf16_t* scale = reinterpret_cast<const bf16_t*>(&scales);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[w][i] += static_cast<float>(scale[2 * w + i / 2]) * part[w][i];
  }
}

SGL_DEVICE void store_parts(float* parts, const float (&sum)[4][4], int m) {  // [m][kRowPart]
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane % 4 * 2 + i % 2, column = 16 * w + 8 * (i / 2) + lane / 4;
      if (row < m) parts[row * kRowPart + column] = sum[w][i];
    }
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

// What the block has of its columns, to those that finish them. A warp a row of a column.
SGL_DEVICE void send_sums(const Layer& p, const Step& s, const BlockShare& block, const float* first_parts, const float* last_parts, uint32_t launch) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, strip_units = s.strip.value;
  const int first = s.strip.divide(block.begin), columns = s.strip.divide(block.end - 1) - first + 1;
  const Share theirs = block.of_warp(lane % kWarps);
  for (int task = warp; task < columns << p.log_rows; task += kWarps) {
    const int row = task & ((1 << p.log_rows) - 1), index = first + (task >> p.log_rows);
    if (row >= p.m) continue;
    const int begin = index * strip_units, end = begin + strip_units;
    const unsigned have = __ballot_sync(0xffffffff, theirs.meets(begin, end)), left = __ballot_sync(0xffffffff, theirs.end >= end);
    float2 part[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* parts = left >> w & 1 ? first_parts : last_parts;
      part[w] = {};
      if (have >> w & 1) part[w] = reinterpret_cast<const float2*>(parts + (w * p.m + row) * kRowPart)[lane];
    }
    float2 sum = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum.x += part[w].x, sum.y += part[w].y;
    const Column column(s, index);
    const int which = (block.strip * s.halves + column.half) * 2 + (begin < block.begin);
    send(s.inbox + ((column.output * s.parts + which) * kMostRows + row) * 32 + lane, __float_as_uint(sum.x), __float_as_uint(sum.y), launch);
  }
}

// Which parts of an output are sent, as bits: the second part of a column is there if two blocks share it.
SGL_DEVICE unsigned parts_sent(const Step& s, int output) {
  const int part = threadIdx.x % 32, half = part / 2 & (s.halves - 1);
  bool sent = part < s.parts;
  if (sent && part % 2) {
    const int begin = (output * s.halves + half) * s.strip.value;
    sent = owner(s, begin) != owner(s, begin + s.strip.value - 1);
  }
  return __ballot_sync(0xffffffff, sent);
}

// The outputs that are this block's to finish: sums, the norm before, bias, activation, residual; then sent, or written. A warp a row
// of an output, a lane two columns of it.
SGL_DEVICE void finish(const Layer& p, const Step& s, const Step* normed, uint32_t launch) {
  const int lane = threadIdx.x % 32, outputs = s.outputs, columns = outputs * kTileN;
  const int own = (outputs - blockIdx.x + gridDim.x - 1) / gridDim.x;
  for (int task = threadIdx.x / 32; task < own << p.log_rows; task += kWarps) {
    const int row = task & ((1 << p.log_rows) - 1), output = blockIdx.x + (task >> p.log_rows) * gridDim.x;
    if (row >= p.m) continue;
    const int at = output * kTileN + 2 * lane;
    uint32_t residual = 0, norm = 0, bias[2] = {};
    uint32_t* const residual_at = reinterpret_cast<uint32_t*>(s.residual + int64_t(row) * s.n + at);
    if (s.residual) {  // of both norms, the same thread reads and writes it
      residual = __ldcg(residual_at);
      norm = __ldg(reinterpret_cast<const uint32_t*>(s.norm + at));
    }
    if (s.bias) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (h < s.halves) bias[h] = __ldg(reinterpret_cast<const uint32_t*>(s.bias + h * columns + at));
      }
    }
    // Squares have most likely arrived, with x: they are looked at before the sums, and needed after them.
    constexpr int kSquares = kMostOutputs / 32;  // a lane
    const int of_row = normed ? normed->outputs : 0;
    const One* square_at[kSquares];
    One squares[kSquares];
    if (normed) {
#pragma unroll
      for (int i = 0; i < kSquares; ++i) {
        square_at[i] = normed->squares + row * of_row + min(lane + 32 * i, of_row - 1);
        squares[i] = look(square_at[i]);
      }
    }

    const unsigned sent = parts_sent(s, output);
    float2 sum[2] = {};
    for (int first = 0; first < s.parts; first += kLooks) {
      const auto exists = [&](int part) { return part < s.parts && sent >> part & 1; };  // the first one does
      const Two* at[kLooks];
#pragma unroll
      for (int i = 0; i < kLooks; ++i) {
        at[i] = s.inbox + ((output * s.parts + (exists(first + i) ? first + i : first)) * kMostRows + row) * 32 + lane;
      }
      Two v[kLooks];
      receive(v, at, launch);
#pragma unroll
      for (int i = 0; i < kLooks; ++i) {
        if (!exists(first + i)) continue;
        const float x = __uint_as_float(v[i].a.data), y = __uint_as_float(v[i].b.data);
        const bool second = (first + i) / 2 & (s.halves - 1);
        sum[0].x += second ? 0.f : x, sum[0].y += second ? 0.f : y;
        sum[1].x += second ? x : 0.f, sum[1].y += second ? y : 0.f;
      }
    }

    float factor = 1;
    if (normed) {
      bool all = true;
#pragma unroll
      for (int i = 0; i < kSquares; ++i) all &= has_arrived(squares[i], launch);
      if (!__all_sync(0xffffffff, all)) receive(squares, square_at, launch);
      float total = 0;
#pragma unroll
      for (int i = 0; i < kSquares; ++i) total += lane + 32 * i < of_row ? __uint_as_float(squares[i].data) : 0.f;
      factor = rsqrtf(warp_sum(total) / (s.units * kUnitK) + p.eps);
    }
    bf16_t out[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h == s.halves) break;
      const bf16_t* biases = reinterpret_cast<const bf16_t*>(&bias[h]);
      const bf16_t a = static_cast<bf16_t>(sum[h].x * factor + static_cast<float>(biases[0]));
      const bf16_t b = static_cast<bf16_t>(sum[h].y * factor + static_cast<float>(biases[1]));
      out[0] = h ? silu_and_mul(out[0], a) : a;
      out[1] = h ? silu_and_mul(out[1], b) : b;
    }
    float total = 0;
    if (s.residual) {
      bf16_t* const values = reinterpret_cast<bf16_t*>(&residual);
      const bf16_t* const weights = reinterpret_cast<const bf16_t*>(&norm);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float value = static_cast<float>(out[i]) + static_cast<float>(values[i]);
        values[i] = static_cast<bf16_t>(value);
        out[i] = static_cast<bf16_t>(value * static_cast<float>(weights[i]));
        total += value * value;
      }
    }
    const uint32_t pair = reinterpret_cast<const uint32_t&>(out);
    if (s.y) {
      *reinterpret_cast<uint32_t*>(s.y + int64_t(row) * columns + at) = pair;
    } else {
      send(s.sent + (row * columns + at) / 2, pair, launch);
    }
    if (s.residual) {
      total = warp_sum(total);
      if (lane == 0) send(s.squares + row * outputs + output, __float_as_uint(total), launch);
      __stcg(residual_at, residual);
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
  Stage stage;
  for (int step = 0; step < kSteps; ++step) {
    const Step &s = head.steps[step], &before = head.steps[max(step - 1, 0)];
    const BlockShare block(s);
    if (s.x) read_x(p, s, shared_x, block.strip);
    else receive_x(p, s, before, shared_x, block.strip, launch);
    multiplying_sync();
    if (threadIdx.x == 0) head.handing = 0;

    float sum[4][4] = {};
    multiply_all(p, s, ring, stage, block, sum, __cvta_generic_to_shared(shared_x), first_parts);
    if (threadIdx.x == 0) head.handing = 1;
    multiplying_sync();  // x is no longer needed
    store_parts(last_parts + warp * p.m * kRowPart, sum, p.m);
    multiplying_sync();
    send_sums(p, s, block, first_parts, last_parts, launch);
    finish(p, s, step > 0 && before.residual ? &before : nullptr, launch);
    multiplying_sync();  // the parts are no longer needed
  }
  // All blocks know the number: block 0 finishes an output of gate_up, whose norm has squares of all of o, and so sums of every block.
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.launch = launch + 1 ? launch + 1 : 1;  // 0 is what places hold that nothing was sent to
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
  // scratch: int32, zero at first; launch: int32, not zero at first; nothing else may change them.
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
      tvm::ffi::TensorView launch,
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
    TensorMatcher({1}).with_dtype<int32_t>().with_device(device).verify(launch);
    RuntimeCheck(stride.unwrap() % 8 == 0, "rows of x are not aligned to 16 bytes");
    const int64_t hidden = H.unwrap(), intermediate = I.unwrap() * kUnitK;
    const auto on = device.unwrap();

    Layer layer{};
    layer.m = M.unwrap(), layer.eps = eps, layer.rounds_ahead = rounds_ahead;
    layer.launch = static_cast<uint32_t*>(launch.data_ptr());
    RuntimeCheck(1 <= layer.m && layer.m <= kMostRows, "unsupported number of rows ", layer.m);
    while (1 << layer.log_rows < layer.m) ++layer.log_rows;
    auto& [o, gate_up, down, qkv, next_o, next_gate_up] = layer.steps;
    o = step(o_codes, o_scales, K.unwrap(), 1, o_strips, blocks, on);
    gate_up = step(gate_up_codes, gate_up_scales, hidden, 2, gate_up_strips, blocks, on);
    down = step(down_codes, down_scales, intermediate, 1, down_strips, blocks, on);
    qkv = step(qkv_codes, qkv_scales, hidden, 1, qkv_strips, blocks, on);
    next_o = step(next_o_codes, next_o_scales, K.unwrap(), 1, o_strips, blocks, on);
    next_gate_up = step(next_gate_up_codes, next_gate_up_scales, hidden, 2, gate_up_strips, blocks, on);
    RuntimeCheck(o.n == hidden && down.n == hidden && gate_up.n == 2 * intermediate && qkv.n == N.unwrap(), "these products do not follow each other");
    RuntimeCheck(hidden / kTileN <= kMostOutputs, "too wide a norm: ", hidden);
    o.x = static_cast<const bf16_t*>(x.data_ptr()), o.x_stride = stride.unwrap();
    o.residual = down.residual = static_cast<bf16_t*>(residual.data_ptr());
    o.norm = static_cast<const bf16_t*>(first_norm.data_ptr()), down.norm = static_cast<const bf16_t*>(second_norm.data_ptr());
    qkv.bias = bias.size(0) ? static_cast<const bf16_t*>(bias.data_ptr()) : nullptr;
    qkv.y = static_cast<bf16_t*>(y.data_ptr());

    char* free = static_cast<char*>(scratch.data_ptr());
    const char* const end = free + S.unwrap() * sizeof(int32_t);
    const int parts_bytes = kWarps * layer.m * kRowPart * sizeof(float);
    layer.x_bytes = parts_bytes;  // the last parts, in the same place
    for (int i = 0; i < kSteps; ++i) {
      Step& s = layer.steps[i];
      const int outputs = s.outputs;
      const auto take = [&free](int64_t bytes) { return std::exchange(free, free + bytes); };
      s.inbox = reinterpret_cast<Two*>(take(int64_t(outputs) * s.parts * kMostRows * 32 * sizeof(Two)));
      s.sent = reinterpret_cast<One*>(take(int64_t(kMostRows) * outputs * kTileN / 2 * sizeof(One)));
      s.squares = reinterpret_cast<One*>(take(int64_t(kMostRows) * outputs * sizeof(One)));
      layer.x_bytes = std::max<int>(layer.x_bytes, s.strip.value * layer.m * kRowX);
    }
    RuntimeCheck(free <= end, "too little scratch: ", free - end, " bytes are missing");
    layer.stages = std::min(kMostStages, (kSharedBytes - kHeadBytes - parts_bytes - layer.x_bytes) / (kGroups * kStageBytes));
    RuntimeCheck(layer.stages >= kInFlight, "no room for weights beside x");
    const int shared_bytes = kHeadBytes + kGroups * layer.stages * kStageBytes + parts_bytes + layer.x_bytes;
    static const auto allowed = cudaFuncSetAttribute(fused_layer_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    RuntimeDeviceCheck(allowed);
    LaunchKernel(blocks, kThreads, on, shared_bytes).enable_pdl()(fused_layer_kernel, layer);
  }
};

}  // namespace er_sglang
