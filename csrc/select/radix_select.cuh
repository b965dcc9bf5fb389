// n-th largest key of a row by radix select on order-preserving keys, and a sort, by one CTA.
#pragma once
#include <cstdint>
#include <cub/block/block_scan.cuh>

namespace tokenmill::cuda {

constexpr int kTopkThreads = 512;
constexpr int kDigitBits = 11;  // 11, 11 and 10 bits of a key
constexpr int kBins = 1 << kDigitBits;
constexpr int kDigits = 3;

constexpr __host__ __device__ int digit_shift(int digit) {
  return digit == 0 ? 21 : digit == 1 ? 10 : 0;
}
constexpr __host__ __device__ int digit_bits(int digit) { return digit == 2 ? 10 : kDigitBits; }

// Order-preserving unsigned integer of a score, -0 as 0; 0 for scores that are never selected.
__device__ __forceinline__ uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  const uint32_t key =
      bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
  return x > __int_as_float(0xff800000) ? key : 0;
}

// State of the search for a row's wanted-th key: its digits so far, and how many keys with that
// prefix are wanted.
struct TopkState {
  uint32_t prefix;
  // equal: keys with this prefix; candidates: keys with this prefix or a larger one
  int wanted, equal, candidates;
};

struct TopkShared {
  using Scan = cub::BlockScan<unsigned, kTopkThreads>;

  typename Scan::TempStorage scan;
  TopkState state;
  unsigned bins[kBins];
};

__device__ __forceinline__ void clear_bins(unsigned* bins) {
  for (int b = threadIdx.x; b < kBins; b += kTopkThreads) bins[b] = 0;
}

__device__ __forceinline__ void count_key(unsigned* bins, uint32_t key, int digit,
                                          uint32_t prefix) {
  const int shift = digit_shift(digit), bits = digit_bits(digit);
  if (key != 0 && (digit == 0 || key >> (shift + bits) == prefix))
    atomicAdd(&bins[key >> shift & ((1u << bits) - 1)], 1u);
}

// Adds one digit to the state, from the histogram of all keys with its prefix. If fewer keys are
// counted than wanted, all are wanted. Bins are scanned from the highest down.
__device__ inline void narrow(TopkShared& shared, int digit) {
  constexpr int kEach = kBins / kTopkThreads;
  const TopkState old = shared.state;
  const int bins = 1 << digit_bits(digit), first = static_cast<int>(threadIdx.x) * kEach;
  unsigned counts[kEach], sum = 0, before, total;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    counts[i] = first + i < bins ? shared.bins[bins - 1 - first - i] : 0;
    sum += counts[i];
  }
  TopkShared::Scan(shared.scan).ExclusiveSum(sum, before, total);
  const unsigned wanted = min(static_cast<unsigned>(old.wanted), total);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (before < wanted && wanted <= before + counts[i]) {
      shared.state.prefix =
          old.prefix << digit_bits(digit) | static_cast<uint32_t>(bins - 1 - first - i);
      shared.state.wanted = static_cast<int>(wanted - before);
      shared.state.equal = static_cast<int>(counts[i]);
      shared.state.candidates = old.candidates - old.equal + static_cast<int>(before + counts[i]);
    }
    before += counts[i];
  }
  if (wanted == 0 && threadIdx.x == 0) shared.state = {0xffffffffu >> digit_shift(digit), 0, 0, 0};
  __syncthreads();
}

// Sorts `size` numbers, a power of two, by all threads of the CTA: bitonic network.
__device__ inline void sort_ascending(uint64_t* keys, int size) {
  __syncthreads();
  for (int span = 2; span <= size; span *= 2) {
    for (int step = span / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kTopkThreads) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const uint64_t x = keys[low], y = keys[high];
        if ((x > y) == ((low & span) == 0)) keys[low] = y, keys[high] = x;
      }
      __syncthreads();
    }
  }
}

}  // namespace tokenmill::cuda
