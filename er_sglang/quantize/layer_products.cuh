// The products of a fused layer (fused_layer.cuh), and how their pieces are shared out.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>

#include "exchange.cuh"
#include "int4.cuh"

namespace er_sglang {

constexpr int kUnitK = 128;  // of K: a group
constexpr int kUnitTiles = kUnitK / kTileK;
constexpr int kTileBytes = kTileN * kTileK / 2, kScalesBytes = kTileN * 2;
constexpr int kPieceBytes = kUnitTiles * kTileBytes + kScalesBytes;
constexpr int kRowX = kUnitK * 2;  // bytes of a row of a unit of x

constexpr int kSteps = 4, kStepsAhead = 2;  // products of a launch, and of the next one whose weights go to L2
constexpr int kMostRows = 8;
constexpr int kMostParts = 32;     // of an output
constexpr int kMostOutputs = 128;  // before a norm
constexpr int kWarps = 8;          // of a block that multiply

struct Divisor {  // exact where the dividend times it is below 2^32; not 1
  uint32_t value, inverse;
  SGL_DEVICE int divide(int dividend) const { return __umulhi(dividend, inverse); }
};

struct Step {  // a product
  const char* codes;       // [k / 16, n / 64, 32] of 16 bytes
  const char* scales;      // [k / 128, n]
  const bf16_t* bias;      // [n] or null
  bf16_t* x;               // [m, k] of the first product; null: what the product before sent
  bf16_t* y;               // [m, n] of the last one; null: sent
  bf16_t* residual;        // [m, n] or null: with it a norm follows
  const bf16_t* norm;      // [n], its weight
  float* inbox;            // [outputs, parts, m, 64]: sums for the block that finishes an output
  uint32_t* sent;          // [8, columns / 2]: pairs of columns of y, as operands; of launches by turns, as squares
  uint32_t* squares;       // [8, outputs], float32: sums of the squares of an output's columns
  int n, units, x_stride;
  int halves;              // 2: a gated product, y is silu(gate) * up, and W_hat has gate's columns first
  int parts;               // of an output: for each strip and half two, of the block that has the column's start and of the one behind it, if two have it
  Divisor blocks;          // of a strip
  int each, more;          // pieces of a block; blocks of a strip that have one more
  Divisor strip;           // units
  int outputs;             // 64 columns of y each
  Divisor by_each, by_one_more;
};

struct Layer {
  Step steps[kSteps + kStepsAhead];
  uint32_t* launch;  // its number
  uint4* sent;       // all of `sent` and `squares`, of launches with even numbers; of those with odd ones, behind it
  int sent_vectors;  // of each
  float eps;
  int m;             // rows
  int log_rows;      // the binary logarithm of so many or a few more,
  int log_pairs;     // and of pairs of them
  int stages;        // of each ring
  int x_bytes;       // of shared memory, for x and then for the last parts
  int rounds_ahead;  // of the next launch's weights to L2
};

struct Share {  // of pieces that are shared out evenly: each has `each`, the first `more` of them one more
  int begin, end;
  SGL_DEVICE Share(int which, int each, int more) : begin(which * each + min(which, more)), end(begin + each + (which < more)) {}
  SGL_DEVICE Share of_warp(int warp) const {
    Share share(warp, size() / kWarps, size() % kWarps);
    share.begin += begin, share.end += begin;
    return share;
  }
  SGL_DEVICE int size() const { return end - begin; }
  SGL_DEVICE int rounds() const { return (size() + kWarps - 1) / kWarps; }  // in each a warp has at most one
  SGL_DEVICE bool meets(int from, int to) const { return max(begin, from) < min(end, to); }
};

struct BlockShare : Share {  // of a strip's pieces, that of this block
  int strip;
  SGL_DEVICE explicit BlockShare(const Step& s) : BlockShare(s, s.blocks.divide(blockIdx.x)) {}

 private:
  SGL_DEVICE BlockShare(const Step& s, int strip) : Share(blockIdx.x - strip * s.blocks.value, s.each, s.more), strip(strip) {}
};

// Of x, as it is multiplied: float16, and of the second half of a tile's K a sixteenth.
SGL_DEVICE uint32_t as_operands(float a, float b, bool second_half) {
  const float factor = second_half ? 1.f / 16 : 1.f;
  uint32_t two;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b * factor), "f"(a * factor));
  return two;
}
SGL_DEVICE uint32_t as_operands(uint32_t two, bool second_half) {  // of bf16
  const bf16_t* x = reinterpret_cast<const bf16_t*>(&two);
  return as_operands(static_cast<float>(x[0]), static_cast<float>(x[1]), second_half);
}
SGL_DEVICE uint4 as_operands(uint4 v, bool second_half) {
  return {as_operands(v.x, second_half), as_operands(v.y, second_half), as_operands(v.z, second_half), as_operands(v.w, second_half)};
}

SGL_DEVICE int owner(const Step& s, int piece) {  // of a strip, a block of it
  const int of_more = s.more * (s.each + 1);
  return piece < of_more ? s.by_one_more.divide(piece) : s.more + s.by_each.divide(piece - of_more);
}

struct Column {  // of a strip, by the order of pieces: the two halves of an output are neighbours
  int output, half;
  SGL_DEVICE Column(const Step& s, int index) : output(index >> (s.halves - 1)), half(index & (s.halves - 1)) {}
  SGL_DEVICE int tile(const Step& s) const { return output + half * s.outputs; }  // of W_hat's columns
};

}  // namespace er_sglang
