// Plan, shared memory and keys of a CTA of the search.
#pragma once
#include <cub/block/block_scan.cuh>

#include "cuda/math.cuh"
#include "select/hip_block_select/params.h"
#include "select/products.cuh"

namespace tokenmill::cuda::hip_block_select {

// Warps per CTA: few if there are several CTAs per SM, else many, so that the keys of as many units
// are in flight.
constexpr int kFewWarps = 4, kManyWarps = 16;
constexpr int kHipDigitBits = 8;
constexpr int kHipBins = 1 << kHipDigitBits;

struct HipPlan {
  int wanted;
  int slots;           // blocks of keys per 16 rows; 1: a block is processed 16 rows at a time
  int chunks, slices;  // 16 and 64 bytes of a row
  int query_bytes;     // column stride in shared memory
  int rounds;          // levels of a search from a list
  int levels;          // tree levels scored ahead of the search
  int parts;           // CTAs that share the scored-ahead nodes of a list
  int64_t blocks;      // key blocks: list stride in `ahead`
  float* ahead;        // scores of these nodes, indexed by their representative block
  bool keys_aligned, queries_aligned;
};

template <int kColumnTiles>
struct HipShape {
  static constexpr int kColumns = 8 * kColumnTiles;  // queries in shared memory

  // Kept nodes and their halves have a begin, an end and a score each.
  static constexpr int shared_bytes(int query_bytes, int wanted) {
    return kColumns * (query_bytes + 4) + 3 * wanted * 12 + 2 * wanted * 2;
  }
};

// Nodes by index. An unknown score is NaN.
struct HipNodes {
  int *begin, *end;
  float* score;

  __device__ void set(int i, HipNode node, float value) const {
    begin[i] = node.begin, end[i] = node.end, score[i] = value;
  }
};

template <int kThreads>
struct HipShared {
  using Scan = cub::BlockScan<unsigned, kThreads>;
  using MaxScan = cub::BlockScan<int, kThreads>;

  union {
    typename Scan::TempStorage sum;
    typename MaxScan::TempStorage maximum;
  } scan;
  unsigned bins[kHipBins];
  unsigned prefix;
  int wanted;  // wanted scores that begin with the prefix
};

struct Maximum {
  __device__ int operator()(int a, int b) const { return a > b ? a : b; }
};

// Order-preserving unsigned integers of scores.
__device__ __forceinline__ unsigned hip_key(float score) {
  const unsigned bits = __float_as_uint(score);
  return bits ^ (static_cast<unsigned>(static_cast<int>(bits) >> 31) | 0x80000000u);
}

// Keys of one KV head of one request, which begin at row `start`.
template <typename T>
struct HipKeys {
  const HipParams& p;
  const HipPlan& plan;
  int64_t b, start, kv_head;

  // null: zeros
  __device__ __forceinline__ const T* row(int64_t t) const {
    const KeyRun run = key_run(p.k, b, start + t);
    if (run.offset < 0) return nullptr;
    return static_cast<const T*>(p.k.data) + run.offset + kv_head * p.k.head;
  }
  __device__ __forceinline__ void load(uint32_t (&words)[4], const T* row, int chunk) const {
    words[0] = words[1] = words[2] = words[3] = 0;
    if (row == nullptr || chunk >= plan.chunks) return;
    load_chunk(words, row, chunk, static_cast<int>(p.head_dim), plan.keys_aligned);
  }
};

}  // namespace tokenmill::cuda::hip_block_select
