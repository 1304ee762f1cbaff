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

static void next(int from) {  // to the next thread that still runs, in a circle
  const int count = fibers.size();
  for (int step = 1; step <= count; ++step) {
    const int to = (from + step) % count;
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
  next(threadIdx.x);
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
static void __syncthreads() {
  const int self = threadIdx.x;
  on_cpu::next(self);
  threadIdx.x = self;
}

// Shuffles wait for all threads of the block, not of the warp.
template <typename T>
T exchange(T value, int from) {
  __syncthreads();
  std::memcpy(&on_cpu::exchanged[threadIdx.x], &value, sizeof(T));
  __syncthreads();
  std::memcpy(&value, &on_cpu::exchanged[from], sizeof(T));
  return value;
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return exchange(value, threadIdx.x % 32 >= distance ? threadIdx.x - distance : threadIdx.x);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  return exchange(value, threadIdx.x ^ distance);
}

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
