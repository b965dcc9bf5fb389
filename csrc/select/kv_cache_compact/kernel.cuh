// Moves rows to lower slots in place. A CTA owns some columns of one head of one request and
// processes its tokens in order: it reads a chunk of them, waits for all its warps, and writes.
// Later chunks read from slots after the written ones.
#pragma once
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "cuda/warp.cuh"
#include "select/kv_cache_compact/params.h"

namespace tokenmill::cuda::kv_cache_compact {

constexpr int kCompactThreads = 256;
constexpr int kTokensAtOnce = 4;  // per thread
constexpr int kSumTokens = 64;    // summed from zero: a second level of accumulation

struct CompactPlan {
  int lanes;  // adjacent threads of a row, each with one unit
  // units per row: vectors of 16 bytes or elements; for rotated keys pairs, then the remaining
  // elements
  int units;
  unsigned blocks;  // CTAs per head
};

// Pair i rotated by delta slots.
__device__ __forceinline__ float2 turned(const CompactParams& p, int i, int delta, float2 x) {
  const auto step = static_cast<float>(delta);
  const float turns = p.turns[i], product = __fmul_rn(step, turns);
  const float low = fmaf(step, p.turns_rest[i], fmaf(step, turns, -product));
  float sine, cosine;
  // Whole revolutions are removed from the two-float product, so that long moves keep their
  // precision.
  sincospif(2 * (product - rintf(product) + low), &sine, &cosine);
  return {x.x * cosine - x.y * sine, x.y * cosine + x.x * sine};
}

struct CompactPlace {
  int64_t b, h, count, length;
  const int32_t* list;

  __device__ CompactPlace(const CompactParams& p, int64_t bh)
      : b(bh / p.heads),
        h(bh % p.heads),
        count(p.count(b, h)),
        length(p.length(b)),
        list(p.list(b, h)) {}
};

// Unit: what a thread moves, 16 bytes or an element.
template <typename Unit>
__global__ void __launch_bounds__(kCompactThreads)
    move_rows_kernel(const __grid_constant__ CompactParams p, const Rows rows,
                     const CompactPlan plan) {
  const CompactPlace at(p, blockIdx.x / plan.blocks);
  const int unit = blockIdx.x % plan.blocks * plan.lanes + threadIdx.x % plan.lanes;
  const int row = threadIdx.x / plan.lanes, chunk = kCompactThreads / plan.lanes;
  // Strides are in elements; a Unit may contain several.
  const auto address = [&](int64_t offset, int bytes) {
    return static_cast<char*>(rows.data) + (offset + at.h * rows.head) * bytes +
           unit * static_cast<int64_t>(sizeof(Unit));
  };
  const int bytes = p.dtype == DType::float32 ? 4 : 2;
  for (int64_t base = 0; base < at.count; base += chunk * kTokensAtOnce) {
    Unit held[kTokensAtOnce];
    char* to[kTokensAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      const int64_t d = base + row + i * chunk;
      if (d >= at.count || unit >= plan.units) continue;
      const int64_t from = at.list[d];
      if (from <= d || from >= at.length) continue;
      const int64_t source = p.offset(rows, at.b, from), target = p.offset(rows, at.b, d);
      if (source < 0 || target < 0) continue;
      held[i] = *reinterpret_cast<const Unit*>(address(source, bytes));
      to[i] = address(target, bytes);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i)
      if (to[i]) *reinterpret_cast<Unit*>(to[i]) = held[i];
  }
}

// The same for rotated keys. A thread moves a pair, or one of the elements after the pairs.
template <typename T>
__global__ void __launch_bounds__(kCompactThreads)
    turn_rows_kernel(const __grid_constant__ CompactParams p, const CompactPlan plan) {
  const CompactPlace at(p, blockIdx.x / plan.blocks);
  const int unit = blockIdx.x % plan.blocks * plan.lanes + threadIdx.x % plan.lanes;
  const int row = threadIdx.x / plan.lanes, chunk = kCompactThreads / plan.lanes;
  const int pairs = static_cast<int>(p.pairs);
  const bool pair = unit < pairs;
  const int x = !pair ? unit + pairs : p.interleaved ? 2 * unit : unit;
  const int y = p.interleaved ? x + 1 : x + pairs;
  for (int64_t base = 0; base < at.count; base += chunk * kTokensAtOnce) {
    float2 held[kTokensAtOnce];
    T* to[kTokensAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i) {
      const int64_t d = base + row + i * chunk;
      if (d >= at.count || unit >= plan.units) continue;
      const int64_t from = at.list[d];
      if (from <= d || from >= at.length) continue;
      const int64_t source = p.offset(p.k, at.b, from), target = p.offset(p.k, at.b, d);
      if (source < 0 || target < 0) continue;
      const T* key = static_cast<const T*>(p.k.data) + source + at.h * p.k.head;
      held[i] = {static_cast<float>(key[x]), pair ? static_cast<float>(key[y]) : 0.f};
      if (pair) held[i] = turned(p, unit, static_cast<int>(d - from), held[i]);
      to[i] = static_cast<T*>(p.k.data) + target + at.h * p.k.head;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTokensAtOnce; ++i)
      if (to[i]) {
        to[i][x] = static_cast<T>(held[i].x);
        if (pair) to[i][y] = static_cast<T>(held[i].y);
      }
  }
}

// Sums over the dropped tokens, which no list names. A warp processes every eighth token for 32
// columns.
template <typename T>
__global__ void __launch_bounds__(kCompactThreads)
    sum_dropped_kernel(const __grid_constant__ CompactParams p, const Rows rows, int dim,
                       unsigned blocks, float* sums, int32_t* dropped) {
  constexpr int kWarps = kCompactThreads / kWarpSize;
  __shared__ float parts[kWarps][kWarpSize];
  __shared__ int numbers[kWarps];
  const CompactPlace at(p, blockIdx.x / blocks);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int column = static_cast<int>(blockIdx.x % blocks) * kWarpSize + lane;
  float total = 0, part = 0;
  int number = 0;
  int64_t next = 0;
  for (int64_t t = warp; t < at.length; t += kWarps) {
    while (next < at.count && at.list[next] < t) ++next;
    if (next < at.count && at.list[next] == t) continue;
    const int64_t offset = p.offset(rows, at.b, t);
    if (offset >= 0 && column < dim)
      part += static_cast<float>(
          (static_cast<const T*>(rows.data) + offset + at.h * rows.head)[column]);
    if (++number % kSumTokens == 0) total += part, part = 0;
  }
  parts[warp][lane] = total + part;
  if (lane == 0) numbers[warp] = number;
  __syncthreads();
  if (warp > 0) return;
  total = 0;
  number = 0;
  for (int i = 0; i < kWarps; ++i) total += parts[i][lane], number += numbers[i];
  const int64_t bh = blockIdx.x / blocks;
  if (column < dim) sums[bh * dim + column] = total;
  if (dropped && column == 0) dropped[bh] = number;
}

__global__ void __launch_bounds__(kCompactThreads)
    new_lengths_kernel(const __grid_constant__ CompactParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kCompactThreads + threadIdx.x;
  const int64_t heads = p.per_head ? p.heads : 1;
  if (at < p.batch * heads)
    p.new_lengths[at] = static_cast<int32_t>(p.count(at / heads, at % heads));
}

}  // namespace tokenmill::cuda::kv_cache_compact
