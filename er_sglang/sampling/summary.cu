// What the blocks of _partials_kernel found in a row, summed up: the log of its mass and the winner of its race. For rows
// with top-k, top-p or min-p also the smallest scaled logit kept, the log of the kept mass, and the winner among the kept.
//
// The floor is found by radix selection. A turn counts tokens and mass in 2048 bins, of which the last whose tokens are
// kept holds the floor, and is what the next turn divides. The first turn's bins are 1/64 wide, from the largest logit
// down, so that neighbouring threads seldom add to the same bin; the others' are of equal numbers of float32 values. The
// second turn also lists the tokens that are left, and the others read the list, if it holds them: a row is read twice.
//
// Masses are sums of integers, so no order of addition changes them and equal logits have equal floors on every rank.
// A mass of 2^44 is the whole row's. A bin holds it as two words, since shared memory adds words of 32 bits: neither
// overflows for vocabularies up to 2^19.

typedef unsigned long long uint64;

constexpr int kThreads = 1024;
constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr int kMassBits = 44;
constexpr int kPartBits = 13;
constexpr int kListed = 4096;
constexpr unsigned kWarp = 0xffffffff;
constexpr float kValueBinsPerNat = 64;
constexpr uint64 kNoLimit = ~0ull;
constexpr unsigned kKeyOfMinusInfinity = 0x007fffff;
constexpr unsigned kKeyOfInfinity = 0xff800000;
constexpr unsigned kKeyOfNaN = 0xffc00000;

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
    value = combine(value, __shfl_xor_sync(kWarp, value, distance));
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

// A share of a row's mass: whole * 2^-31 + part * 2^-44.
struct Share {
  unsigned whole;
  unsigned part;

  __device__ explicit Share(float share) {
    const unsigned bits = __float_as_uint(fminf(share, 1.0f));
    const uint64 mantissa = static_cast<uint64>((bits & 0x7fffff) | 0x800000) << 40;
    const uint64 fixed = mantissa >> min(127 - (bits >> 23), 63u);
    whole = fixed >> 32;
    part = static_cast<unsigned>(fixed) >> (32 - kPartBits);
  }

  __device__ uint64 mass() const { return (static_cast<uint64>(whole) << kPartBits) + part; }
};

struct Row {
  const float* logits;
  int size;
  float temperature;
  float top;
  float lse;

  __device__ float scaled(int token) const { return scaled_logit(logits[token]); }

  __device__ float scaled_logit(float x) const { return temperature == 1.0f ? x : divided(x, temperature); }

  __device__ Share share(float x) const { return Share(__expf(x - lse)); }

  // visit(x) for all tokens, by whole warps: where the row has ended, x is not a number.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    constexpr int kAtOnce = 8;
    for (int start = 0; start < size; start += kAtOnce * kThreads) {
      float x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int token = start + i * kThreads + threadIdx.x;
        x[i] = token < size ? logits[token] : value_of(kKeyOfNaN);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) visit(scaled_logit(x[i]));
    }
  }
};

// Scaled logits, in no order.
struct List {
  float at[kListed];
  int length;  // more than kListed if some did not fit

  __device__ bool is_whole() const { return length <= kListed; }

  // By a whole warp; members: its threads that add x.
  __device__ void add(float x, unsigned members) {
    const int lane = threadIdx.x % 32;
    int end = 0;
    if (lane == 0) end = atomicAdd(&length, __popc(members));
    const int place = __shfl_sync(kWarp, end, 0) + __popc(members & ((1u << lane) - 1));
    if (members >> lane & 1 && place < kListed) at[place] = x;
  }

  // As Row::each.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    for (int start = 0; start < length; start += kThreads) {
      const int place = start + threadIdx.x;
      visit(place < length ? at[place] : value_of(kKeyOfNaN));
    }
  }
};

struct Sums {
  unsigned tokens;
  uint64 mass;

  __device__ void operator+=(const Sums& other) {
    tokens += other.tokens;
    mass += other.mass;
  }
};

struct Bins {
  unsigned tokens[kBins];
  unsigned whole[kBins];
  unsigned part[kBins];

  __device__ void clear() {
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) tokens[bin] = whole[bin] = part[bin] = 0;
  }

  __device__ void add(unsigned bin, unsigned count, Share share) {
    atomicAdd(&tokens[bin], count);
    if (share.whole) atomicAdd(&whole[bin], share.whole);
    if (share.part) atomicAdd(&part[bin], share.part);
  }

  // By a whole warp; members: its threads that add. Equal logits, as of weights that say nothing, add to one bin: once.
  __device__ void add_by_warp(unsigned bin, Share share, unsigned members) {
    const int lane = threadIdx.x % 32, first = __ffs(members) - 1;
    const bool member = members >> lane & 1;
    const unsigned first_bin = __shfl_sync(kWarp, bin, first);
    if (__all_sync(kWarp, !member || bin == first_bin)) {
      share.whole = __reduce_add_sync(kWarp, member ? share.whole : 0);
      share.part = __reduce_add_sync(kWarp, member ? share.part : 0);
      if (lane == first) add(bin, __popc(members), share);
    } else if (member) {
      add(bin, 1, share);
    }
  }

  __device__ Sums operator[](int bin) const {
    return {tokens[bin], (static_cast<uint64>(whole[bin]) << kPartBits) + part[bin]};
  }
};

// Sum over the threads before this one.
__device__ Sums sums_before(Sums own) {
  __shared__ Sums warps[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sums total = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned tokens = __shfl_up_sync(kWarp, total.tokens, distance);
    const uint64 mass = __shfl_up_sync(kWarp, total.mass, distance);
    if (lane >= distance) {
      total.tokens += tokens;
      total.mass += mass;
    }
  }
  if (lane == 31) warps[warp] = total;
  __syncthreads();
  for (int before = 0; before < warp; ++before) total += warps[before];
  return {total.tokens - own.tokens, total.mass - own.mass};
}

__device__ unsigned value_bin(float top, float x) {
  const float bin = fminf(fmaxf((top - x) * kValueBinsPerNat, 0.0f), kBins - 1);
  return __float_as_uint(bin + 8388608.0f) & (kBins - 1);  // 2^23: rounds, and leaves the integer in the low bits
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
// `lowest`: a value known to lie below it.
__device__ Kept select(const Row& row, Bins& bins, float lowest, unsigned token_limit, uint64 mass_limit) {
  __shared__ List list;
  __shared__ int last;
  __shared__ Sums above, within;
  __shared__ unsigned edges[2];
  unsigned low = key_of(lowest), high = kKeyOfInfinity;
  int shift = 0;
  Sums carried = {0, 0};
  for (int turn = 0;; ++turn) {
    bins.clear();
    if (threadIdx.x == 0) {
      last = -1;
      if (turn < 2) list.length = 0;
    }
    __syncthreads();
    const auto visit = [&](float x) {
      const unsigned key = key_of(x);
      const unsigned members = __ballot_sync(kWarp, low <= key && key <= high);
      if (!members) return;
      if (turn == 1) list.add(x, members);
      bins.add_by_warp(turn == 0 ? value_bin(row.top, x) : (high - key) >> shift, row.share(x), members);
    };
    if (turn > 1 && list.is_whole()) {
      list.each(visit);
    } else {
      row.each(visit);
    }
    __syncthreads();
    constexpr int kOwn = kBins / kThreads;
    Sums own = {0, 0};
    for (int i = 0; i < kOwn; ++i) own += bins[threadIdx.x * kOwn + i];
    Sums before = sums_before(own), found_above, found;
    before += carried;
    int candidate = -1;
    for (int i = 0; i < kOwn; ++i) {
      const Sums sums = bins[threadIdx.x * kOwn + i];
      if (sums.tokens && before.tokens < token_limit && before.mass <= mass_limit) {
        candidate = threadIdx.x * kOwn + i;
        found_above = before;
        found = sums;
      }
      before += sums;
    }
    if (candidate >= 0) atomicMax(&last, candidate);
    __syncthreads();
    const int bin = last;
    if (bin < 0) return {value_of(kKeyOfMinusInfinity), 1ull << kMassBits};  // no logit is a number
    if (candidate == bin) {
      above = found_above;
      within = found;
    }
    if (turn == 0 && threadIdx.x < 2) {
      const int upper = threadIdx.x;
      edges[upper] = bin < upper ? kKeyOfInfinity + 1 : lower_edge(row.top, bin - upper);
    }
    __syncthreads();
    carried = above;
    if (turn == 0) {
      low = max(low, edges[0]);
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
    if (x >= floor) own += row.share(x).mass();
  });
  own = over_warp(own, [](uint64 a, uint64 b) { return a + b; });
  if (threadIdx.x % 32 == 0) atomicAdd(&total, own);
  __syncthreads();
  return total;
}

// The winner of the race among kept tokens. A block's leader among all tokens leads among the kept ones if it is kept;
// else that block runs again, unless its leader was behind a kept one or it keeps nothing.
__device__ int race(
    const Row& row, const Parts& parts, int block_size, float floor, const uint64* state, unsigned request,
    unsigned stream) {
  __shared__ uint64 winner;
  __shared__ bool again[kThreads];
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
    for (int token = i * block_size + threadIdx.x; token < end; token += kThreads) {
      const float x = row.scaled(token);
      if (x >= floor) {
        atomicMax(&winner, packed(x - log_exponential(philox(seed, token, request, stream, cycle)), token));
      }
    }
  }
  __syncthreads();
  return token_of(winner);
}

// Per row. parts: [rows, blocks], of `block_size` tokens each. lses: of all tokens. kept_lses: of those kept, may be lses.
extern "C" __global__ void __launch_bounds__(kThreads, 1) summarize_rows(
    const float* logits, const float* temperatures, const int* top_ks, const float* top_ps, const float* min_ps,
    const bool* sequential, const uint64* state, const float* tops, const float* sums, const float* best,
    const int* arg, float* lses, float* floors, float* kept_lses, long long* tokens, int row_stride, int size,
    int rows_per_request, int blocks, int block_size, int stream, int draws) {
  __shared__ Bins bins;
  const int index = blockIdx.x, request = index / rows_per_request, first = index * blocks;
  const int top_k = top_ks[request];
  const float top_p = top_ps[request], min_p = min_ps[request];
  const bool by_rank = top_k < size, by_mass = top_p < 1.0f;
  const bool filtered = top_k > 1 && (by_rank || by_mass || min_p > 0.0f);
  if (!filtered && threadIdx.x >= 32) return;

  const Parts parts = {tops + first, sums + first, best + first, arg + first, blocks};
  const Summary all = summarize(parts);
  Kept kept = {value_of(kKeyOfMinusInfinity), 1ull << kMassBits};
  int token = all.winner;
  if (filtered) {
    const Row row = {logits + static_cast<long long>(index) * row_stride, size, temperatures[request], all.top, all.lse};
    const unsigned token_limit = by_rank ? top_k : size;
    if (by_rank && by_mass && sequential[request]) kept = select(row, bins, kept.floor, token_limit, kNoLimit);
    if (by_rank || by_mass) {
      const uint64 limit = by_mass ? static_cast<uint64>(static_cast<double>(top_p) * kept.mass) : kNoLimit;
      // All tokens below this one hold less than what top_p leaves out, rounding included.
      if (top_p < 0.9999f) kept.floor = fmaxf(kept.floor, all.lse + logf((1 - top_p) / size) - 1);
      kept = select(row, bins, kept.floor, token_limit, limit);
    }
    const float min_p_floor = all.top + logf(min_p);
    if (min_p_floor > kept.floor) kept = {min_p_floor, mass_from(row, min_p_floor)};
    if (draws) token = race(row, parts, block_size, kept.floor, state, request, stream);
  }
  if (threadIdx.x == 0) {
    lses[index] = all.lse;
    floors[index] = kept.floor;
    kept_lses[index] = all.lse + static_cast<float>(log(static_cast<double>(kept.mass) / (1ull << kMassBits)));
    tokens[index] = token;
  }
}
