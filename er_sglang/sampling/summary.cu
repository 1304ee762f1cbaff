// What the blocks of _partials_kernel found in a row, summed up: the log of its mass and the winner of its race. For rows
// with top-k, top-p or min-p also the smallest scaled logit kept, the log of the kept mass, and the winner among the kept.
//
// The floor is found by radix selection. A turn reads the row once and counts tokens and mass in 2048 bins, of which the
// last whose tokens are kept holds the floor, and is what the next turn divides. The first turn's bins are 1/64 wide,
// from the largest logit down, so that neighbouring threads seldom add to the same bin; the others' are of equal
// numbers of float32 values. The third turn's bins are single values unless the floor is near 0.
//
// Masses are sums of integers, so no order of addition changes them and equal logits have equal floors on every rank.
// A mass of 2^44 is the whole row's. A bin holds it as two words, since shared memory adds words of 32 bits: neither
// overflows for vocabularies up to 2^19.

typedef unsigned long long uint64;

// Thread blocks that share a row with filters: a cluster, which Hopper has. One warp does for other rows.
#ifndef CLUSTER
#define CLUSTER 1
#endif
#if CLUSTER > 1
#define SHARING __cluster_dims__(CLUSTER)
#else
#define SHARING
#endif

constexpr int kThreads = 1024;
constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr int kMassBits = 44;
constexpr int kLowBits = 13;
constexpr int kMaxBlocks = 1024;
constexpr float kValueBinsPerNat = 64;
constexpr unsigned kNoTokenLimit = ~0u;
constexpr uint64 kNoLimit = ~0ull;
constexpr unsigned kKeyOfMinusInfinity = 0x007fffff;
constexpr unsigned kKeyOfInfinity = 0xff800000;

// float32 -> unsigned with the same order.
__device__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ float value_of(unsigned key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// As Triton divides: the other kernels compare these quotients with the floor.
__device__ float divided(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("div.full.f32 %0, %1, %2;" : "=f"(a) : "f"(a), "f"(b));
  return a;
#else
  return a / b;
#endif
}

// First word of Philox 4x32-10, as in philox.py.
__device__ unsigned philox(uint64 seed, unsigned c0, unsigned c1, unsigned c2, unsigned c3) {
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const unsigned b0 = c0, b2 = c2;
    c0 = __umulhi(0xCD9E8D57u, b2) ^ c1 ^ k0;
    c2 = __umulhi(0xD2511F53u, b0) ^ c3 ^ k1;
    c1 = 0xCD9E8D57u * b2;
    c3 = 0xD2511F53u * b0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

__device__ float log_exponential(unsigned bits) {
  const float u = (static_cast<float>(bits) + 0.5f) * 2.3283064365386963e-10f;
  return logf(u < 1e-3f ? u + 0.5f * u * u : -logf(1.0f - u));
}

// Orders by score, then by smaller token.
__device__ uint64 packed(float score, int token) {
  return static_cast<uint64>(key_of(score)) << 32 | ~static_cast<unsigned>(token);
}

__device__ int token_of(uint64 packed) { return ~static_cast<unsigned>(packed); }

template <typename T, typename Combine>
__device__ T over_warp(T value, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Of one row, by blocks of tokens: largest scaled logit, sum of exp below it, and the leader of the race without filters.
struct Parts {
  const float* top;
  const float* sum;
  const float* best;
  const int* arg;
  int blocks;

  __device__ uint64 leader(int block) const { return packed(best[block], arg[block]); }
};

struct Summary {
  float top;
  float lse;
  int winner;
};

// By every warp for itself.
__device__ Summary summarize(const Parts& parts) {
  const int lane = threadIdx.x % 32;
  float top = value_of(kKeyOfMinusInfinity);
  uint64 leader = 0;
  for (int block = lane; block < parts.blocks; block += 32) {
    top = fmaxf(top, parts.top[block]);
    leader = max(leader, parts.leader(block));
  }
  top = over_warp(top, [](float a, float b) { return fmaxf(a, b); });
  leader = over_warp(leader, [](uint64 a, uint64 b) { return max(a, b); });
  float sum = 0;
  for (int block = lane; block < parts.blocks; block += 32) sum += parts.sum[block] * expf(parts.top[block] - top);
  sum = over_warp(sum, [](float a, float b) { return a + b; });
  return {top, top + logf(sum), token_of(leader)};
}

// All threads of a row.
__device__ void sync_row() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ int rank_in_row() { return blockIdx.x % CLUSTER; }

// What lies at the same place in the shared memory of another block of the row.
template <typename T>
__device__ T of_rank(const T& here, int rank) {
#if CLUSTER > 1
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&here));
  unsigned there;
  T value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  if constexpr (sizeof(T) == 8) {
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(there) : "memory");
  } else {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(there) : "memory");
  }
  return value;
#else
  return here;
#endif
}

struct Row {
  const float* logits;
  int size;
  float temperature;
  float top;
  float lse;

  __device__ float scaled(int token) const { return scaled_logit(logits[token]); }

  __device__ float scaled_logit(float x) const { return temperature == 1.0f ? x : divided(x, temperature); }

  __device__ float mass(float x) const { return __expf(x - lse) * 2147483648.0f; }  // in units of 2^-31

  // visit(x) for all tokens, by all threads of the row.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    constexpr int kAtOnce = 8, kStride = kThreads * CLUSTER;
    int token = rank_in_row() * kThreads + threadIdx.x;
    for (; token + (kAtOnce - 1) * kStride < size; token += kAtOnce * kStride) {
      float x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) x[i] = logits[token + i * kStride];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) visit(scaled_logit(x[i]));
    }
    for (; token < size; token += kStride) visit(scaled(token));
  }
};

struct Sums {
  unsigned tokens;
  uint64 mass;
};

struct Bins {
  unsigned tokens[kBins];
  unsigned high[kBins];
  unsigned low[kBins];

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) tokens[bin] = high[bin] = low[bin] = 0;
  }

  // Tokens are counted, or only noted.
  __device__ void add(unsigned bin, float mass, bool counts) {
    const unsigned whole = static_cast<unsigned>(mass);
    if (counts) {
      atomicAdd(&tokens[bin], 1u);
    } else {
      tokens[bin] = 1;
    }
    if (whole) atomicAdd(&high[bin], whole);
    const unsigned part = static_cast<unsigned>((mass - static_cast<float>(whole)) * (1 << kLowBits));
    if (part) atomicAdd(&low[bin], part);
  }

  // Of the whole row.
  __device__ Sums operator[](int bin) const {
    Sums sums = {0, 0};
    for (int rank = 0; rank < CLUSTER; ++rank) {
      sums.tokens += of_rank(tokens[bin], rank);
      sums.mass += (static_cast<uint64>(of_rank(high[bin], rank)) << kLowBits) + of_rank(low[bin], rank);
    }
    return sums;
  }
};

// Sum over the threads before this one.
__device__ Sums sums_before(Sums own) {
  __shared__ Sums warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sums total = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned tokens = __shfl_up_sync(0xffffffffu, total.tokens, distance);
    const uint64 mass = __shfl_up_sync(0xffffffffu, total.mass, distance);
    if (lane >= distance) {
      total.tokens += tokens;
      total.mass += mass;
    }
  }
  if (lane == 31) warps[warp] = total;
  __syncthreads();
  for (int before = 0; before < warp; ++before) {
    total.tokens += warps[before].tokens;
    total.mass += warps[before].mass;
  }
  return {total.tokens - own.tokens, total.mass - own.mass};
}

__device__ unsigned value_bin(float top, float x) {
  return static_cast<unsigned>(fminf(fmaxf((top - x) * kValueBinsPerNat, 0.0f), kBins - 1));
}

// Smallest key in the value bins up to `bin`.
__device__ unsigned lower_edge(float top, unsigned bin) {
  unsigned below = kKeyOfMinusInfinity - 1, key = kKeyOfInfinity;
  while (key - below > 1) {
    const unsigned middle = below + (key - below) / 2;
    if (value_bin(top, value_of(middle)) <= bin) {
      key = middle;
    } else {
      below = middle;
    }
  }
  return key;
}

struct Kept {
  float floor;
  uint64 mass;
};

// The smallest value above which lie fewer than `token_limit` tokens and at most `mass_limit`, and the mass from it up.
// Every block of the row finds it for itself.
__device__ Kept select(const Row& row, Bins& bins, unsigned token_limit, uint64 mass_limit) {
  __shared__ int last;
  __shared__ Sums above, within;
  __shared__ unsigned edges[2];
  unsigned low = kKeyOfMinusInfinity, high = kKeyOfInfinity;
  int shift = 0;
  Sums carried = {0, 0};
  const bool counts = token_limit != kNoTokenLimit;
  for (bool by_value = true;; by_value = false) {
    bins.clear();
    if (threadIdx.x == 0) last = -1;
    __syncthreads();
    row.each([&](float x) {
      const unsigned key = key_of(x);
      if (key < low || key > high) return;
      bins.add(by_value ? value_bin(row.top, x) : (high - key) >> shift, row.mass(x), counts);
    });
    sync_row();
    constexpr int kOwn = kBins / kThreads;
    Sums each[kOwn], own = {0, 0};
    for (int i = 0; i < kOwn; ++i) {
      each[i] = bins[threadIdx.x * kOwn + i];
      own.tokens += each[i].tokens;
      own.mass += each[i].mass;
    }
    Sums before = sums_before(own), found_above, found;
    before.tokens += carried.tokens;
    before.mass += carried.mass;
    int candidate = -1;
    for (int i = 0; i < kOwn; ++i) {
      const Sums sums = each[i];
      if (sums.tokens && before.tokens < token_limit && before.mass <= mass_limit) {
        candidate = threadIdx.x * kOwn + i;
        found_above = before;
        found = sums;
      }
      before.tokens += sums.tokens;
      before.mass += sums.mass;
    }
    if (candidate >= 0) atomicMax(&last, candidate);
    __syncthreads();
    const int bin = last;
    if (bin < 0) return {value_of(kKeyOfMinusInfinity), 1ull << kMassBits};  // no logit is a number
    if (candidate == bin) {
      above = found_above;
      within = found;
    }
    if (by_value && threadIdx.x < 2) {
      const int upper = threadIdx.x;
      edges[upper] = bin < upper ? kKeyOfInfinity + 1 : lower_edge(row.top, bin - upper);
    }
    sync_row();  // all blocks have read the bins
    carried = above;
    if (by_value) {
      low = edges[0];
      high = edges[1] - 1;
    } else {
      high -= static_cast<unsigned>(bin) << shift;
      low = high - low < 1u << shift ? low : high - (1u << shift) + 1;
    }
    if (low == high) return {value_of(high), above.mass + within.mass};
    const int bits = 32 - __clz(high - low);
    shift = bits > kBinBits ? bits - kBinBits : 0;
  }
}

// The mass from `floor` up.
__device__ uint64 mass_from(const Row& row, float floor) {
  __shared__ uint64 total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  uint64 own = 0;
  row.each([&](float x) {
    if (x >= floor) own += static_cast<uint64>(row.mass(x) * (1 << kLowBits));
  });
  own = over_warp(own, [](uint64 a, uint64 b) { return a + b; });
  if (threadIdx.x % 32 == 0) atomicAdd(&total, own);
  sync_row();
  uint64 of_row = 0;
  for (int rank = 0; rank < CLUSTER; ++rank) of_row += of_rank(total, rank);
  return of_row;
}

// The winner of the race among kept tokens. A block's leader among all tokens leads among the kept ones if it is kept;
// else that block runs again, unless its leader was behind a kept one or it keeps nothing.
__device__ int race(
    const Row& row, const Parts& parts, int block_size, float floor, const uint64* state, unsigned request,
    unsigned stream) {
  __shared__ uint64 winner;
  __shared__ bool again[kMaxBlocks];
  if (threadIdx.x == 0) winner = 0;
  __syncthreads();
  const int block = threadIdx.x;
  const uint64 leader = block < parts.blocks ? parts.leader(block) : 0;
  const bool kept = block < parts.blocks && row.scaled(parts.arg[block]) >= floor;
  if (kept) atomicMax(&winner, leader);
  __syncthreads();
  again[block] = !kept && leader > winner && parts.top[block] >= floor;
  __syncthreads();
  const uint64 seed = state[0];
  const unsigned cycle = state[1];
  for (int i = 0; i < parts.blocks; ++i) {
    if (!again[i]) continue;
    const int end = min((i + 1) * block_size, row.size);
    for (int token = i * block_size + rank_in_row() * kThreads + threadIdx.x; token < end; token += kThreads * CLUSTER) {
      const float x = row.scaled(token);
      if (x >= floor) {
        atomicMax(&winner, packed(x - log_exponential(philox(seed, token, request, stream, cycle)), token));
      }
    }
  }
  sync_row();
  uint64 of_row = 0;
  for (int rank = 0; rank < CLUSTER; ++rank) of_row = max(of_row, of_rank(winner, rank));
  return token_of(of_row);
}

// Per row. parts: [rows, blocks], of `block_size` tokens each. lses: of all tokens. kept_lses: of those kept, may be lses.
extern "C" __global__ void __launch_bounds__(kThreads, 1) SHARING summarize_rows(
    const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
    const bool* sequential, const uint64* state, const float* tops, const float* sums, const float* best,
    const int* arg, float* lses, float* floors, float* kept_lses, long long* tokens, int row_stride, int size,
    int rows_per_request, int blocks, int block_size, int stream, int draws) {
  __shared__ Bins bins;
  const int index = blockIdx.x / CLUSTER, request = index / rows_per_request, first = index * blocks;
  const int top_k = top_ks[request];
  const float top_p = top_ps[request], min_p = min_ps[request];
  const bool by_rank = top_k < size, by_mass = top_p < 1.0f;
  const bool filtered = top_k > 1 && (by_rank || by_mass || min_p > 0.0f);
  if (!filtered && (rank_in_row() > 0 || threadIdx.x >= 32)) return;

  const Parts parts = {tops + first, sums + first, best + first, arg + first, blocks};
  const Summary all = summarize(parts);
  Kept kept = {value_of(kKeyOfMinusInfinity), 1ull << kMassBits};
  int token = all.winner;
  if (filtered) {
    const Row row = {logits + static_cast<long long>(index) * row_stride, size, temperatures[request], all.top, all.lse};
    if (by_rank && by_mass && sequential[request]) kept = select(row, bins, top_k, kNoLimit);
    if (by_rank || by_mass) {
      const uint64 limit = by_mass ? static_cast<uint64>(static_cast<double>(top_p) * kept.mass) : kNoLimit;
      kept = select(row, bins, by_rank ? top_k : kNoTokenLimit, limit);
    }
    const float min_p_floor = all.top + logf(min_p);
    if (min_p_floor > kept.floor) kept = {min_p_floor, mass_from(row, min_p_floor)};
    if (draws) token = race(row, parts, block_size, kept.floor, state, request, stream);
    sync_row();  // no block ends while another reads its shared memory
  }
  if (rank_in_row() == 0 && threadIdx.x == 0) {
    lses[index] = all.lse;
    floors[index] = kept.floor;
    kept_lses[index] = all.lse + static_cast<float>(log(static_cast<double>(kept.mass) / (1ull << kMassBits)));
    tokens[index] = token;
  }
}
