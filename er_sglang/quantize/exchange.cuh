// How blocks of a kernel hand each other numbers, while all of them run: through L2, without counters or fences.
//
// Every eight bytes that are sent are four of data and the number of the launch, and arrive at once, so a reader waits for the data
// itself. A place is written once a launch; what it holds of earlier launches has another number (but after 2^32 of them). Launches may lay
// out the same memory differently: the number is always the second half of eight bytes.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>

namespace er_sglang {

struct One {
  uint32_t data, launch;
};
struct Two {
  One a, b;
};

SGL_DEVICE uint64_t as_bits(One one) { return uint64_t(one.launch) << 32 | one.data; }
SGL_DEVICE One as_one(uint64_t bits) { return {uint32_t(bits), uint32_t(bits >> 32)}; }

SGL_DEVICE void send(One* to, uint32_t data, uint32_t launch) {
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(as_bits({data, launch})) : "memory");
}
SGL_DEVICE void send(Two* to, uint32_t a, uint32_t b, uint32_t launch) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(as_bits({a, launch})), "l"(as_bits({b, launch})) : "memory");
}

SGL_DEVICE One look(const One* at) {
  uint64_t bits;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(bits) : "l"(at) : "memory");
  return as_one(bits);
}
SGL_DEVICE Two look(const Two* at) {
  uint64_t a, b;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(at) : "memory");
  return {as_one(a), as_one(b)};
}

SGL_DEVICE bool has_arrived(const One& v, uint32_t launch) { return v.launch == launch; }
SGL_DEVICE bool has_arrived(const Two& v, uint32_t launch) { return (v.a.launch == launch) & (v.b.launch == launch); }

constexpr int kMostLooks = 1 << 24;  // ten seconds or more: who should send does not run

// v[i] from at[i], as soon as all of a warp's have arrived. All are looked at at once, again and again; there is one in each place: on
// conditions, the compiler would wait for one look before the next.
template <int kCount, typename V>
SGL_DEVICE void receive(V (&v)[kCount], const V* const (&at)[kCount], uint32_t launch) {
  for (int looks = 0;; ++looks) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] = look(at[i]);
    bool all = true;
#pragma unroll
    for (int i = 0; i < kCount; ++i) all &= has_arrived(v[i], launch);
    if (__all_sync(0xffffffff, all)) return;
    if (looks == kMostLooks) __trap();
  }
}

}  // namespace er_sglang
