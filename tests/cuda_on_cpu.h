// Enough of CUDA to run one kernel on a CPU: a block's threads are fibers that change places where they wait for another.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __expf expf

using std::max;
using std::min;

struct Index {
  int x;
};
static Index threadIdx, blockIdx;

namespace on_cpu {
constexpr int kStackBytes = 64 << 10;
static std::vector<ucontext_t> fibers;
static std::vector<char> stacks, running;
static std::vector<uint64_t> exchanged;
static ucontext_t main_fiber;
static std::function<void()> body;

// To the next thread that still runs, in a circle of `count` from `first`.
static void next(int first, int count) {
  const int from = threadIdx.x;
  for (int step = 1; step <= count; ++step) {
    const int to = first + (from - first + step) % count;
    if (!running[to]) continue;
    threadIdx.x = to;
    if (to != from) swapcontext(&fibers[from], &fibers[to]);
    return;
  }
  setcontext(&main_fiber);
}

static void enter() {
  body();
  running[threadIdx.x] = false;
  next(0, fibers.size());
}

// Runs `kernel` for every block in turn; `args` as cuLaunchKernel takes them, a pointer to each.
template <typename... Args, size_t... I>
void launch(void (*kernel)(Args...), int blocks, int threads, void** args, std::index_sequence<I...>) {
  body = [=] { kernel(*static_cast<Args*>(args[I])...); };
  fibers.resize(threads);
  stacks.resize(size_t(threads) * kStackBytes);
  exchanged.resize(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    running.assign(threads, true);
    for (int i = 0; i < threads; ++i) {
      getcontext(&fibers[i]);
      fibers[i].uc_stack.ss_sp = &stacks[size_t(i) * kStackBytes];
      fibers[i].uc_stack.ss_size = kStackBytes;
      makecontext(&fibers[i], enter, 0);
    }
    threadIdx.x = 0;
    swapcontext(&main_fiber, &fibers[0]);
  }
}

template <typename... Args>
void launch(void (*kernel)(Args...), int blocks, int threads, void** args) {
  launch(kernel, blocks, threads, args, std::index_sequence_for<Args...>());
}
}  // namespace on_cpu

// Between two barriers every thread runs once, in order.
static void wait_for(int first, int count) {
  const int self = threadIdx.x;
  on_cpu::next(first, count);
  threadIdx.x = self;
}

static void __syncthreads() { wait_for(0, on_cpu::fibers.size()); }
static void __syncwarp() { wait_for(threadIdx.x / 32 * 32, 32); }

// The value of a thread of this warp.
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  __syncwarp();
  std::memcpy(&on_cpu::exchanged[threadIdx.x], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, &on_cpu::exchanged[threadIdx.x / 32 * 32 + lane], sizeof(T));
  return value;
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(~0u, value, lane >= distance ? lane - distance : lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return __shfl_sync(~0u, value, threadIdx.x % 32 ^ distance);
}

static unsigned __reduce_add_sync(unsigned, unsigned value) {
  unsigned sum = 0;
  __shfl_sync(~0u, value, 0);
  for (int lane = 0; lane < 32; ++lane) {
    unsigned of_lane;
    std::memcpy(&of_lane, &on_cpu::exchanged[threadIdx.x / 32 * 32 + lane], sizeof of_lane);
    sum += of_lane;
  }
  return sum;
}

static unsigned __ballot_sync(unsigned, bool value) {
  return __reduce_add_sync(~0u, unsigned(value) << threadIdx.x % 32);
}

static bool __all_sync(unsigned, bool value) { return __ballot_sync(~0u, value) == ~0u; }

template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at += value;
  return old;
}

template <typename T>
T atomicMax(T* at, T value) {
  const T old = *at;
  *at = std::max(old, value);
  return old;
}

static unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

static float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
static int __clz(unsigned x) { return __builtin_clz(x); }
static int __ffs(unsigned x) { return __builtin_ffs(x); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
