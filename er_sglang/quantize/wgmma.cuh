// Hopper's warpgroup product: d[64, N] += a[64, 16] @ b[16, N], a in registers, b in shared memory, sums in float32.
//
// Each warp of the group holds 16 rows of a and d: rows r and r + 8 of lane 4 r + c, as in mma.m16n8k16. Rows of b's transpose
// (N of them, of 64 elements, 128 bytes) are stored with the 128-byte swizzle that the copy engine writes.
#pragma once

#include <sgl_kernel/utils.cuh>

#include <cstdint>

namespace er_sglang {

SGL_DEVICE uint64_t matrix_descriptor(uint32_t shared_address) {  // groups of 8 rows are 1024 bytes apart
  return uint64_t(shared_address >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

SGL_DEVICE void wgmma_fence() {  // registers written before it may be read by products after it
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Keeps the computation of a before the next fence: after it, ptxas would run all products one by one.
SGL_DEVICE void pin(uint32_t (&a)[4]) {
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));
}

SGL_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
SGL_DEVICE void wgmma_wait() {  // until at most so many commits are unfinished
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The registers of d, by N, in the instruction's text and as operands.
#define ER_TEXT_8 "%0, %1, %2, %3"
#define ER_SUMS_8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define ER_TEXT_16 ER_TEXT_8 ", %4, %5, %6, %7"
#define ER_SUMS_16 ER_SUMS_8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define ER_TEXT_24 ER_TEXT_16 ", %8, %9, %10, %11"
#define ER_SUMS_24 ER_SUMS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define ER_TEXT_32 ER_TEXT_24 ", %12, %13, %14, %15"
#define ER_SUMS_32 ER_SUMS_24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define ER_TEXT_40 ER_TEXT_32 ", %16, %17, %18, %19"
#define ER_SUMS_40 ER_SUMS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define ER_TEXT_48 ER_TEXT_40 ", %20, %21, %22, %23"
#define ER_SUMS_48 ER_SUMS_40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define ER_TEXT_56 ER_TEXT_48 ", %24, %25, %26, %27"
#define ER_SUMS_56 ER_SUMS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define ER_TEXT_64 ER_TEXT_56 ", %28, %29, %30, %31"
#define ER_SUMS_64 ER_SUMS_56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define ER_TEXT_72 ER_TEXT_64 ", %32, %33, %34, %35"
#define ER_SUMS_72 ER_SUMS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define ER_TEXT_80 ER_TEXT_72 ", %36, %37, %38, %39"
#define ER_SUMS_80 ER_SUMS_72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define ER_TEXT_88 ER_TEXT_80 ", %40, %41, %42, %43"
#define ER_SUMS_88 ER_SUMS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define ER_TEXT_96 ER_TEXT_88 ", %44, %45, %46, %47"
#define ER_SUMS_96 ER_SUMS_88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define ER_TEXT_104 ER_TEXT_96 ", %48, %49, %50, %51"
#define ER_SUMS_104 ER_SUMS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define ER_TEXT_112 ER_TEXT_104 ", %52, %53, %54, %55"
#define ER_SUMS_112 ER_SUMS_104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define ER_TEXT_120 ER_TEXT_112 ", %56, %57, %58, %59"
#define ER_SUMS_120 ER_SUMS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define ER_TEXT_128 ER_TEXT_120 ", %60, %61, %62, %63"
#define ER_SUMS_128 ER_SUMS_120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

#define ER_WGMMA(TYPE, NAME, N, A0, A1, A2, A3, B, ADD)                                                              \
  SGL_DEVICE void wgmma(TYPE, float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int add) {                 \
    asm volatile(                                                                                               \
        "{.reg .pred add; setp.ne.b32 add, %" #ADD ", 0;"                                                       \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #NAME "." #NAME " {" ER_TEXT_##N "},"                 \
        "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 0;}"                                     \
        : ER_SUMS_##N                                                                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                                  \
  }
#define ER_WGMMA_BOTH(...) ER_WGMMA(bf16_t, bf16, __VA_ARGS__) ER_WGMMA(fp16_t, f16, __VA_ARGS__)
ER_WGMMA_BOTH(8, 4, 5, 6, 7, 8, 9)
ER_WGMMA_BOTH(16, 8, 9, 10, 11, 12, 13)
ER_WGMMA_BOTH(24, 12, 13, 14, 15, 16, 17)
ER_WGMMA_BOTH(32, 16, 17, 18, 19, 20, 21)
ER_WGMMA_BOTH(40, 20, 21, 22, 23, 24, 25)
ER_WGMMA_BOTH(48, 24, 25, 26, 27, 28, 29)
ER_WGMMA_BOTH(56, 28, 29, 30, 31, 32, 33)
ER_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37)
ER_WGMMA_BOTH(72, 36, 37, 38, 39, 40, 41)
ER_WGMMA_BOTH(80, 40, 41, 42, 43, 44, 45)
ER_WGMMA_BOTH(88, 44, 45, 46, 47, 48, 49)
ER_WGMMA_BOTH(96, 48, 49, 50, 51, 52, 53)
ER_WGMMA_BOTH(104, 52, 53, 54, 55, 56, 57)
ER_WGMMA_BOTH(112, 56, 57, 58, 59, 60, 61)
ER_WGMMA_BOTH(120, 60, 61, 62, 63, 64, 65)
ER_WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69)

}  // namespace er_sglang
