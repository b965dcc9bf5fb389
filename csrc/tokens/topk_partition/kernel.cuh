// Partitions tokens by score: one CTA per row finds the k-th largest key, then sends each token to
// its side in token order.
#pragma once
#include "cuda/vector.cuh"
#include "select/radix_select.cuh"
#include "tokens/topk_partition/params.h"

namespace tokenmill::cuda::topk_partition {

constexpr int kSharedSort = 2048;  // maximum kept tokens sorted in shared memory
constexpr unsigned kSharedKeys =
    4096;  // tokens whose scores are read once; later tokens are reread each time
constexpr unsigned kSectorBytes = 32;

// Number of idle threads before the row's first token, so that each warp accesses whole sectors.
template <typename T>
__device__ __forceinline__ unsigned skipped_places(const T* row) {
  return static_cast<unsigned>(reinterpret_cast<uintptr_t>(row) % kSectorBytes / sizeof(T));
}

struct PartitionMemory {
  uint64_t* sort_keys;  // sort_stride per row, if more than kSharedSort are sorted
  int64_t sort_stride;
};

template <typename T>
struct PartitionRow {
  const TopkPartitionParams& p;
  const T* scores;
  const bool* valid;

  __device__ PartitionRow(const TopkPartitionParams& params, int64_t b)
      : p(params),
        scores(static_cast<const T*>(params.scores) + b * params.scores_batch),
        valid(params.valid ? params.valid + b * params.valid_batch : nullptr) {}

  // NaN and -inf scores come before invalid tokens.
  __device__ __forceinline__ uint32_t key_at(unsigned i) const {
    if (is_protected(p, i)) return kProtectedKey;
    if (valid && !valid[i]) return kInvalidKey;
    const float x = static_cast<float>(scores[i]);
    return max(key_of(p.largest ? x : -x), kInvalidKey + 1);
  }
};

template <typename T>
__global__ void __launch_bounds__(kTopkThreads, 2)
    topk_partition_kernel(const __grid_constant__ TopkPartitionParams p,
                          const __grid_constant__ PartitionMemory memory) {
  __shared__ TopkShared shared;
  __shared__ uint64_t shared_sort[kSharedSort];
  __shared__ uint32_t keys[kSharedKeys];
  // Unsigned: the tile after the last of 2^31 - 1 tokens begins past int.
  const unsigned tokens = static_cast<unsigned>(p.tokens);
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const PartitionRow<T> row(p, b);
    const unsigned k = static_cast<unsigned>(count_of(p, b));
    const bool all = k == 0 || (k == tokens && !p.by_score);  // all tokens on one side, in order
    int32_t* const keep = p.keep + b * p.k;
    int32_t* const rest = p.rest + b * p.others;
    for (int64_t i = k + threadIdx.x; i < p.k; i += kTopkThreads) keep[i] = -1;
    for (int64_t i = tokens - k + threadIdx.x; i < p.others; i += kTopkThreads) rest[i] = -1;
    for (unsigned i = threadIdx.x; all && i < tokens; i += kTopkThreads)
      (k == 0 ? rest : keep)[i] = static_cast<int32_t>(i);
    if (all) continue;

    // An index before the row wraps around to a large number.
    const unsigned skipped = skipped_places(row.scores);
    for (unsigned t = threadIdx.x; t < min(tokens, kSharedKeys) + skipped; t += kTopkThreads)
      if (const unsigned i = t - skipped; i < min(tokens, kSharedKeys)) keys[i] = row.key_at(i);
    // Each thread only reads keys that it has written.
    const auto key_at = [&](unsigned i) { return i < kSharedKeys ? keys[i] : row.key_at(i); };
    if (threadIdx.x == 0) shared.state = {0, static_cast<int>(k), 0, 0};
    for (int digit = 0; digit < kDigits; ++digit) {
      clear_bins(shared.bins);
      __syncthreads();
      const uint32_t prefix = shared.state.prefix;
      for (unsigned t = threadIdx.x; t < tokens + skipped; t += kTopkThreads)
        if (const unsigned i = t - skipped; i < tokens)
          count_key(shared.bins, key_at(i), digit, prefix);
      __syncthreads();
      narrow(shared, digit);
    }
    const uint32_t threshold = shared.state.prefix;
    const unsigned ties = shared.state.wanted;

    uint64_t* const sorted =
        memory.sort_keys ? memory.sort_keys + b * memory.sort_stride : shared_sort;
    unsigned above = 0, equal = 0;
    for (unsigned tile = 0; tile < tokens + skipped; tile += kTopkThreads) {
      const unsigned i = tile + threadIdx.x - skipped;
      const uint32_t key = i < tokens ? key_at(i) : 0;
      const bool greater = key > threshold, tie = key == threshold;
      unsigned before, total;  // greater keys in the low half, ties in the high half
      TopkShared::Scan(shared.scan).ExclusiveSum(greater ? 1u : tie ? 0x10000u : 0u, before, total);
      const unsigned ties_before = equal + (before >> 16);
      const unsigned place = above + (before & 0xffff) + min(ties_before, ties);
      if (greater || (tie && ties_before < ties)) {
        if (p.by_score)
          sorted[place] = static_cast<uint64_t>(~key) << 32 | i;
        else
          keep[place] = static_cast<int32_t>(i);
      } else if (i < tokens) {
        // Overwrites the keys of this and earlier tiles, which all threads have read.
        const unsigned at = i - place;
        if (at < kSharedKeys)
          keys[at] = i;
        else
          rest[at] = static_cast<int32_t>(i);
      }
      above += total & 0xffff;
      equal += total >> 16;
      __syncthreads();
    }
    const unsigned others = min(tokens - k, kSharedKeys), before_rest = skipped_places(rest);
    for (unsigned t = threadIdx.x; t < others + before_rest; t += kTopkThreads)
      if (const unsigned i = t - before_rest; i < others) rest[i] = static_cast<int32_t>(keys[i]);
    __syncthreads();  // the next row overwrites keys
    if (!p.by_score) continue;
    unsigned size = 1;
    while (size < k) size *= 2;
    for (unsigned i = k + threadIdx.x; i < size; i += kTopkThreads) sorted[i] = ~uint64_t{0};
    sort_ascending(sorted, static_cast<int>(size));
    for (unsigned i = threadIdx.x; i < k; i += kTopkThreads)
      keep[i] = static_cast<int32_t>(sorted[i]);
    __syncthreads();
  }
}

}  // namespace tokenmill::cuda::topk_partition
