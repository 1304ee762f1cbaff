// Marlin's int4 layout (marlin_layout.py) as both products read it: tiles, and how codes become numbers.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>
#include <type_traits>

namespace er_sglang {

constexpr int kTileN = 64;  // rows of W_hat in a tile
constexpr int kTileK = 16;  // of a tile, and of one tensor-core product

template <typename T>
struct Magic;  // bits of a power of two whose last mantissa bit is worth 1: or a code into them to get their sum
template <>
struct Magic<bf16_t> {
  static constexpr uint32_t bits = 0x43004300;  // 128
};
template <>
struct Magic<fp16_t> {
  static constexpr uint32_t bits = 0x64006400;  // 1024
};

SGL_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {  // in one instruction
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(a), "r"(mask), "r"(bits));
  return v;
}

// Two codes of a register of eight, plus the magic number.
template <typename T>
SGL_DEVICE uint32_t magic_codes(uint32_t codes) {
  return and_or(codes, 0x000f000fu, Magic<T>::bits);
}

// The two behind them, 16-fold.
template <typename T>
SGL_DEVICE uint32_t magic_codes_16(uint32_t codes) {
  static_assert(std::is_same_v<T, fp16_t>, "bf16 has too few bits");
  return and_or(codes, 0x00f000f0u, Magic<T>::bits);
}

// The zero point of rows r and r + 8, twice in a register each, plus the magic number: the one of symmetric weights, or
// those of slab `w` of a lane's eight packed ones.
template <typename T, bool kSymmetric>
SGL_DEVICE void magic_zeros(uint32_t (&zero)[2], uint32_t packed, int w) {
  if constexpr (kSymmetric) {
    zero[0] = zero[1] = Magic<T>::bits | 0x00080008u;
  } else {
    const uint32_t both = packed >> (4 * w) & 0x000f000fu;
    zero[0] = __byte_perm(both, 0, 0x1010) | Magic<T>::bits;
    zero[1] = __byte_perm(both, 0, 0x3232) | Magic<T>::bits;
  }
}

template <typename T>
SGL_DEVICE uint32_t subtract2(uint32_t a, uint32_t b) {
  using T2 = std::conditional_t<std::is_same_v<T, bf16_t>, bf16x2_t, fp16x2_t>;
  const T2 difference = __hsub2(reinterpret_cast<const T2&>(a), reinterpret_cast<const T2&>(b));
  return reinterpret_cast<const uint32_t&>(difference);
}

}  // namespace er_sglang
