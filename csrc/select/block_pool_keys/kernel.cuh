// A thread pools kVector adjacent columns of a head over the tokens of a block; adjacent threads
// have adjacent columns.
#pragma once
#include "cuda/launch.cuh"
#include "cuda/math.cuh"
#include "cuda/vector.cuh"
#include "select/block_pool_keys/params.h"

namespace tokenmill::cuda {

constexpr int kPoolThreads = 256;

// slots: threads that share the blocks of a request; each processes every slots-th block.
struct PoolPlan {
  int64_t slots;
  int chunks;  // chunks of kVector columns per head
};

template <bool kMean, int kVector>
struct Pooled {
  float low[kVector], high[kVector];  // low holds the sum for a mean

  __device__ Pooled() {
#pragma unroll
    for (int i = 0; i < kVector; ++i) low[i] = kMean ? 0 : infinity(), high[i] = -infinity();
  }
  __device__ __forceinline__ void add(const float (&x)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      low[i] = kMean ? low[i] + x[i] : min_or_nan(low[i], x[i]);
      if (!kMean) high[i] = max_or_nan(high[i], x[i]);
    }
  }
};

template <typename T, bool kMean, int kVector>
__global__ void __launch_bounds__(kPoolThreads, 4)
    pool_kernel(const __grid_constant__ PoolParams p, const __grid_constant__ PoolPlan plan) {
  const int64_t item = int64_t{blockIdx.x} * kPoolThreads + threadIdx.x;
  const int64_t row = item / plan.chunks, place = row / p.kv_heads, b = place / plan.slots;
  if (b >= p.batch) return;
  const int c = static_cast<int>(item % plan.chunks) * kVector;
  const int64_t h = row % p.kv_heads;
  const T* const keys = static_cast<const T*>(p.k.data) + h * p.k.head + c;
  const PoolBlocks blocks = pool_blocks(p, b);
  for (int64_t block = blocks.begin + place % plan.slots; block < blocks.end; block += plan.slots) {
    const int64_t begin = block * p.block;
    const int64_t end = begin + p.block < blocks.length ? begin + p.block : blocks.length;
    Pooled<kMean, kVector> pooled;
    for (int64_t t = begin; t < end;) {
      const KeyRun run = key_run(p.k, b, t);
      const int64_t run_end = run.end < end ? run.end : end;
      const T* from = keys + run.offset;
      if (run.offset < 0) t = run_end;
#pragma unroll 4
      for (; t < run_end; ++t, from += p.k.seq) {
        float x[kVector];
        load_floats(x, from);
        pooled.add(x);
      }
    }
    T* const out =
        static_cast<T*>(p.out) + b * p.out_batch + block * p.out_block + h * p.out_head + c;
    if constexpr (kMean) {
      const float count = end > begin ? static_cast<float>(end - begin) : 1;
#pragma unroll
      for (int i = 0; i < kVector; ++i) pooled.low[i] = pooled.low[i] / count;
      store_floats(out, pooled.low);
    } else {
      if (p.mode == PoolMode::minmax) store_floats(out, pooled.low);
      store_floats(out + p.out_half, pooled.high);
    }
  }
}

template <typename T, bool kMean, int kVector>
const char* launch_pool(const PoolParams& p, cudaStream_t stream) {
  PoolPlan plan{};
  // Few blocks receive appended tokens at a time.
  plan.slots = p.start && p.blocks > 8 ? 8 : p.blocks;
  plan.chunks = static_cast<int>(ceil_div(p.head_dim, kVector));
  const int64_t blocks = ceil_div(p.batch * plan.slots * p.kv_heads * plan.chunks, kPoolThreads);
  return launch<pool_kernel<T, kMean, kVector>>(blocks, kPoolThreads, 0, stream, p, plan);
}

// Launches the kernel for one element type.
template <typename T>
const char* launch_pool(const PoolParams& p, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const bool vector =
      is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head) &&
      is_vectorizable<T>(p.out, p.head_dim, p.out_batch, p.out_block, p.out_head, p.out_half);
  if (p.mode == PoolMode::mean)
    return vector ? launch_pool<T, true, kVector>(p, stream) : launch_pool<T, true, 1>(p, stream);
  return vector ? launch_pool<T, false, kVector>(p, stream) : launch_pool<T, false, 1>(p, stream);
}

}  // namespace tokenmill::cuda
