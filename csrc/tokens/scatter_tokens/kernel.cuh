// The indices are inverted first, so that each row of out is written once.
#pragma once
#include "tokens/row_copy.cuh"
#include "tokens/scatter_tokens/params.h"

namespace tokenmill::cuda::scatter_tokens {

// Among rows of the same token the last one wins, in any order of threads.
__global__ void __launch_bounds__(kRowThreads)
    scatter_places_kernel(const __grid_constant__ ScatterTokensParams p) {
  const int64_t k = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
  if (k >= p.entries) return;
  for (int64_t s = blockIdx.y; s < p.sequences; s += gridDim.y) {
    const int id = p.indices[s * p.indices_batch + k];
    if (id >= 0 && id < p.rows) atomicMax(p.places + s * p.rows + id, static_cast<int>(k));
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    scatter_tokens_kernel(const __grid_constant__ ScatterTokensParams p) {
  const int64_t n = row_of_thread();
  if (n >= p.tokens) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int place = p.places[b * p.tokens + n];
    const char* from = p.base ? p.base + b * p.base_batch + n * p.base_token : nullptr;
    if (place >= 0) from = p.y + b * p.y_batch + place * p.y_row;
    copy_row(reinterpret_cast<T*>(p.out + (b * p.tokens + n) * p.row_bytes),
             reinterpret_cast<const T*>(from), p.row_bytes / sizeof(T), threadIdx.x, blockDim.x);
  }
}

}  // namespace tokenmill::cuda::scatter_tokens
