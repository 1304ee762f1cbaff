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
constexpr int kHalfWarp = 16;         // lanes that have a row of a column, four numbers each

SGL_DEVICE float half_warp_sum(float v) {
#pragma unroll
  for (int offset = kHalfWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffff, v, offset);
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

// What the block has of its columns, to those that finish them. A warp two rows of a column.
SGL_DEVICE void send_sums(const Layer& p, const Step& s, const BlockShare& block, const float* first_parts, const float* last_parts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, strip_units = s.strip.value;
  const int first = s.strip.divide(block.begin), columns = s.strip.divide(block.end - 1) - first + 1;
  const Share theirs = block.of_warp(lane % kWarps);
  for (int task = warp; task < columns << p.log_pairs; task += kWarps) {
    const int row = 2 * (task & ((1 << p.log_pairs) - 1)) + lane / kHalfWarp, index = first + (task >> p.log_pairs);
    const int begin = index * strip_units, end = begin + strip_units;
    const unsigned have = __ballot_sync(0xffffffff, theirs.meets(begin, end)), left = __ballot_sync(0xffffffff, theirs.end >= end);
    if (row >= p.m) continue;
    float4 part[kWarps];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* parts = left >> w & 1 ? first_parts : last_parts;
      part[w] = {};
      if (have >> w & 1) part[w] = reinterpret_cast<const float4*>(parts + (w * p.m + row) * kRowPart)[lane % kHalfWarp];
    }
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum.x += part[w].x, sum.y += part[w].y, sum.z += part[w].z, sum.w += part[w].w;
    const Column column(s, index);
    const int which = (block.strip * s.halves + column.half) * 2 + (begin < block.begin);
    uint4* const to = reinterpret_cast<uint4*>(s.inbox + ((column.output * s.parts + which) * p.m + row) * kTileN);
    send(to + lane % kHalfWarp, reinterpret_cast<const uint4&>(sum));
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

// The outputs that are this block's to finish: sums, the norm before, bias, activation, residual; then sent, or written. A warp two rows
// of an output, a lane four columns of one. `turn`: this launch's place, behind `sent` and `squares`.
SGL_DEVICE void finish(const Layer& p, const Step& s, const Step* normed, int turn) {
  const int lane = threadIdx.x % 32, outputs = s.outputs, columns = outputs * kTileN;
  const int own = (outputs - blockIdx.x + gridDim.x - 1) / gridDim.x;
  for (int task = threadIdx.x / 32; task < own << p.log_pairs; task += kWarps) {
    const int pair = task & ((1 << p.log_pairs) - 1), output = blockIdx.x + (task >> p.log_pairs) * gridDim.x;
    if (2 * pair >= p.m) continue;
    const bool exists = 2 * pair + lane / kHalfWarp < p.m;  // else the lane does what its twin does, and keeps it
    const int row = exists ? 2 * pair + lane / kHalfWarp : p.m - 1;
    const int at = output * kTileN + 4 * (lane % kHalfWarp);
    uint2 residual = {}, norm = {}, bias[2] = {};
    uint2* const residual_at = reinterpret_cast<uint2*>(s.residual + int64_t(row) * s.n + at);
    if (s.residual) {  // of both norms, the same thread reads and writes it
      residual = __ldcg(residual_at);
      norm = __ldg(reinterpret_cast<const uint2*>(s.norm + at));
    }
    if (s.bias) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (h < s.halves) bias[h] = __ldg(reinterpret_cast<const uint2*>(s.bias + h * columns + at));
      }
    }
    // Squares have most likely arrived, with x: they are looked at before the sums, and needed after them.
    constexpr int kSquares = kMostOutputs / (2 * kHalfWarp);  // pairs of them, a lane
    const int pairs_of_row = normed ? normed->outputs / 2 : 0;
    uint2* square_at[kSquares];
    uint2 squares[kSquares];
    if (normed) {
#pragma unroll
      for (int i = 0; i < kSquares; ++i) {
        square_at[i] = reinterpret_cast<uint2*>(normed->squares + turn) + row * pairs_of_row + min(lane % kHalfWarp + kHalfWarp * i, pairs_of_row - 1);
        squares[i] = look(square_at[i]);
      }
    }

    float sum[2][4] = {};
    for (unsigned left = parts_sent(s, output); left;) {
      int part[kLooks];
      uint4* at_part[kLooks];
      const unsigned these = left;
#pragma unroll
      for (int i = 0; i < kLooks; ++i) {
        part[i] = left ? __ffs(left) - 1 : part[max(i - 1, 0)];
        at_part[i] = reinterpret_cast<uint4*>(s.inbox + ((output * s.parts + part[i]) * p.m + row) * kTileN) + lane % kHalfWarp;
        left &= left - 1;
      }
      uint4 v[kLooks];
      receive(v, at_part);
#pragma unroll
      for (int i = 0; i < kLooks; ++i) {
        if (i >= __popc(these)) continue;
        if (exists) take_back(at_part[i]);
        const float* values = reinterpret_cast<const float*>(&v[i]);
        const bool second = part[i] / 2 & (s.halves - 1);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[0][j] += second ? 0.f : values[j], sum[1][j] += second ? values[j] : 0.f;
      }
    }

    float factor = 1;
    if (normed) {
      bool all = true;
#pragma unroll
      for (int i = 0; i < kSquares; ++i) all &= has_arrived(squares[i]);
      if (!__all_sync(0xffffffff, all)) receive(squares, square_at);
      float total = 0;
#pragma unroll
      for (int i = 0; i < kSquares; ++i) {
        total += lane % kHalfWarp + kHalfWarp * i < pairs_of_row ? __uint_as_float(squares[i].x) + __uint_as_float(squares[i].y) : 0.f;
      }
      factor = rsqrtf(half_warp_sum(total) / (s.units * kUnitK) + p.eps);
    }
    bf16_t out[4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (h == s.halves) break;
      const bf16_t* biases = reinterpret_cast<const bf16_t*>(&bias[h]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bf16_t value = static_cast<bf16_t>(sum[h][j] * factor + static_cast<float>(biases[j]));
        out[j] = h ? silu_and_mul(out[j], value) : value;
      }
    }
    float total = 0;
    if (s.residual) {
      bf16_t* const values = reinterpret_cast<bf16_t*>(&residual);
      const bf16_t* const weights = reinterpret_cast<const bf16_t*>(&norm);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float value = static_cast<float>(out[j]) + static_cast<float>(values[j]);
        values[j] = static_cast<bf16_t>(value);
        out[j] = static_cast<bf16_t>(value * static_cast<float>(weights[j]));
        total += value * value;
      }
      total = half_warp_sum(total);
    }
    if (!exists) continue;
    if (s.y) {
      *reinterpret_cast<uint2*>(s.y + int64_t(row) * columns + at) = reinterpret_cast<const uint2&>(out);
    } else {
      const bool second_half = at % kTileK >= kTileK / 2;
      const uint2 four = {
          as_operands(static_cast<float>(out[0]), static_cast<float>(out[1]), second_half),
          as_operands(static_cast<float>(out[2]), static_cast<float>(out[3]), second_half)};
      send(reinterpret_cast<uint2*>(s.sent + turn + (row * columns + at) / 2), four);
    }
    if (s.residual) {
      if (lane % kHalfWarp == 0) send(s.squares + turn + row * outputs + output, __float_as_uint(total));
      __stcg(residual_at, residual);
    }
  }
}

}  // namespace er_sglang
