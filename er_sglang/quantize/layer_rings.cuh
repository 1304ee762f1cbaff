// Rings of a fused layer (fused_layer.cuh): in shared memory, what a block multiplies next, and the warps that fill them with it.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>

#include "copy_engine.cuh"
#include "layer_products.cuh"

namespace er_sglang {

constexpr int kGroup = 2;  // of the warps that multiply share a ring, which a warp of its own fills: a stage is a piece for each
constexpr int kGroups = kWarps / kGroup;
constexpr int kFilling = kGroup * kUnitTiles;  // lanes, each copies a row of tiles
constexpr unsigned kFillingLanes = (1u << kFilling) - 1;
constexpr int kStageBytes = kGroup * kPieceBytes;
constexpr int kMostStages = 6;
constexpr int kInFlight = 2;  // stages of a ring; while blocks hand each other sums, 1

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

}  // namespace er_sglang
