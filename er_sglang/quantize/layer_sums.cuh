// Sums of a fused layer (fused_layer.cuh): how a block adds up what its warps have, sends it to the blocks that finish it, and finishes
// what is its own.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>

#include "activation.cuh"
#include "exchange.cuh"
#include "layer_products.cuh"

namespace er_sglang {

constexpr int kRowPart = kTileN + 4;  // floats of a row of a warp's part of a column
constexpr int kLooks = 4;             // parts that a lane looks at at once

SGL_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
  return v;
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

}  // namespace er_sglang
