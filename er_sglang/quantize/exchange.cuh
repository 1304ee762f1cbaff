// How blocks of a kernel hand each other numbers, while all of them run: through L2, without counters or fences.
//
// A place holds kNothing until a number is sent to it, so a reader waits for the data itself. kNothing is put back by who alone reads
// it, or, where many read, by the launch behind: these places are there twice, for launches by turns. Only words need to arrive at once.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>

namespace er_sglang {

constexpr uint32_t kNothing = 0xffffffff;  // NaN as float or as two float16, but not the one that arithmetic and conversions give: that is positive

SGL_DEVICE void send(uint2* to, uint2 v) {
  asm volatile("st.relaxed.gpu.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(v.x), "r"(v.y) : "memory");
}
SGL_DEVICE void send(uint4* to, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
SGL_DEVICE void send(uint32_t* to, uint32_t v) { asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(v) : "memory"); }

SGL_DEVICE void take_back(uint4* from) { send(from, {kNothing, kNothing, kNothing, kNothing}); }

SGL_DEVICE uint2 look(const uint2* at) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}
SGL_DEVICE uint4 look(const uint4* at) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

SGL_DEVICE bool has_arrived(const uint2& v) { return (v.x != kNothing) & (v.y != kNothing); }
SGL_DEVICE bool has_arrived(const uint4& v) { return (v.x != kNothing) & (v.y != kNothing) & (v.z != kNothing) & (v.w != kNothing); }

constexpr int kMostLooks = 1 << 24;  // ten seconds or more: who should send does not run

// v[i] from at[i], as soon as all of a warp's have arrived. All are looked at at once, again and again; there is one in each place: on
// conditions, the compiler would wait for one look before the next.
template <int kCount, typename V>
SGL_DEVICE void receive(V (&v)[kCount], V* const (&at)[kCount]) {
  for (int looks = 0;; ++looks) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = look(at[i]);
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all &= has_arrived(v[i]);
    if (__all_sync(0xffffffff, all)) return;
    if (looks == kMostLooks) __trap();
  }
}

}  // namespace er_sglang
