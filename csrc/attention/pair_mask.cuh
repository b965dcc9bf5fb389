// Masks of ranges and spans, tested per pair or per block of 16 queries and 16 keys by the bounds
// of mask_bounds_kernel. The attention kernels apply them in general mode only: they neither copy
// fully masked tiles nor multiply fully masked blocks, and test pairs only in blocks that the
// bounds show to be neither fully masked nor fully visible.
#pragma once
#include "attention/mask_bounds.h"
#include "attention/sequence.cuh"
#include "cuda/arch/opaque.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// query_row, key_row: rows of the mask arrays; key: position within the sequence, which ranges
// refer to.
__device__ __forceinline__ bool sees_pair(const PairMask& mask, int64_t b, int64_t h, int query_row,
                                          int key_row, int key) {
  bool seen = true;
  if (mask.ranges) {
    const int32_t* range =
        mask.ranges + b * mask.ranges_batch + h * mask.ranges_head + query_row * mask.count * 2;
    seen = false;
#pragma unroll 1
    for (int r = 0; r < static_cast<int>(mask.count); ++r, range += 2)
      seen |= range[0] <= key && key < range[1];
  }
  if (mask.q_spans) {
    const int32_t* q = mask.q_spans + b * mask.q_spans_batch + query_row * int64_t{2};
    const int32_t* k = mask.k_spans + b * mask.k_spans_batch + key_row * int64_t{2};
    seen &= q[0] <= k[1] && k[0] <= q[1];
  }
  return seen;
}

// Visibility of a block's pairs: some, all. all without some does not occur.
struct Visibility {
  bool some, all;
};

// Mask of one head of one sequence. Positions must lie in the sequence.
struct HeadMask {
  const PairMask& mask;
  const MaskBounds& bounds;
  int64_t b, h;
  Sequence s;

  // Positions beyond the sequence count as its last one.
  __device__ __forceinline__ bool sees(int query, int key) const {
    key = min(key, s.k_length - 1);
    return sees_pair(mask, b, h, s.q_start + min(query, s.q_length - 1), s.k_start + key, key);
  }

  // Visibility of the block of kBoundRows or fewer queries from `query` on and keys from `key` on.
  // Conservative: may report hidden pairs as visible, never visible ones as hidden.
  __device__ __forceinline__ Visibility visibility(int query, int key, int keys) const {
    constexpr int kRows = static_cast<int>(kBoundRows);
    const int first = s.q_start + query;
    const int last = s.q_start + min(query + kRows, s.q_length) - 1;
    const int key_end = min(key + keys, s.k_length);
    Visibility visibility{true, true};
    if (mask.ranges) {
      const PairBounds* of = bounds.ranges + b * bounds.ranges_batch + h * bounds.ranges_head;
      const int count = static_cast<int>(mask.count);
      visibility = {false, false};
#pragma unroll 1
      for (int r = 0; r < count; ++r) {
        const PairBounds x = of_rows(of + r, count, first, last);
        visibility.some |= x.min_first < key_end && x.max_last > key;
        visibility.all |= x.max_first <= key && x.min_last >= key_end;
      }
    }
    if (mask.q_spans) {
      const PairBounds q = of_rows(bounds.q_spans + b * bounds.q_spans_batch, 1, first, last);
      const PairBounds k = of_rows(bounds.k_spans + b * bounds.k_spans_batch, 1, s.k_start + key,
                                   s.k_start + key_end - 1);
      visibility.some &= q.min_first <= k.max_last && k.min_first <= q.max_last;
      visibility.all &= q.max_first <= k.min_last && k.max_first <= q.min_last;
    }
    return visibility;
  }

 private:
  // Packed sequences start anywhere: their rows lie in up to two blocks of bounds.
  static __device__ __forceinline__ PairBounds of_rows(const PairBounds* of, int step, int first,
                                                       int last) {
    constexpr int kRows = static_cast<int>(kBoundRows);
    const int4 x = *reinterpret_cast<const int4*>(of + first / kRows * int64_t{step});
    const int4 y = *reinterpret_cast<const int4*>(of + last / kRows * int64_t{step});
    return {min(x.x, y.x), max(x.y, y.y), min(x.z, y.z), max(x.w, y.w)};
  }
};

// True if any of `queries` queries from `query` on may see any of `keys` keys from `key` on, in any
// of `heads` heads from `head` on. Called by all lanes of a warp.
__device__ __forceinline__ bool any_sees(const PairMask& mask, const MaskBounds& bounds, int64_t b,
                                         int head, int heads, const Sequence& s, int query,
                                         int queries, int key, int keys) {
  constexpr int kRows = static_cast<int>(kBoundRows);
  const int in_row = (keys + kRows - 1) / kRows, of_head = (queries + kRows - 1) / kRows * in_row;
  const int blocks = mask.ranges_head ? of_head * heads : of_head;
  bool some = false;
#pragma unroll 1
  for (int i = threadIdx.x % kWarpSize; i < blocks; i += kWarpSize) {
    const int q = query + i % of_head / in_row * kRows, k = key + i % in_row * kRows;
    if (q < s.q_length && k < s.k_length)
      some |= HeadMask{mask, bounds, b, head + i / of_head, s}.visibility(q, k, kRows).some;
  }
  return __any_sync(kFullWarp, some);
}

// Shrinks begin .. end to the first and last tile of kTile keys that `sees` accepts; `sees` is
// called by all lanes of a warp. shared: two ints per warp. Called by all threads of the CTA.
template <int kTile, typename Sees>
__device__ __forceinline__ void cut_hidden_ends(int& begin, int& end, int* shared,
                                                const Sees& sees) {
  const int warp = thread_index() / kWarpSize, warps = thread_count() / kWarpSize;
  const int tiles = end > begin ? (end - begin + kTile - 1) / kTile : 0;
  int first = warp, last = tiles - 1 - warp;
#pragma unroll 1
  while (first < tiles && !sees(begin + first * kTile)) first += warps;
#pragma unroll 1
  while (last >= 0 && !sees(begin + last * kTile)) last -= warps;
  if (thread_index() % kWarpSize == 0) shared[2 * warp] = first, shared[2 * warp + 1] = last;
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < warps; ++i) {
    first = min(first, shared[2 * i]);
    last = max(last, shared[2 * i + 1]);
  }
  __syncthreads();
  end = min(end, begin + (last + 1) * kTile);
  begin += min(first, tiles) * kTile;
}

}  // namespace tokenmill::cuda
