#pragma once
#include "cuda/fast_divmod.cuh"
#include "tokens/gather_tokens/params.h"
#include "tokens/row_copy.cuh"

namespace tokenmill::cuda::gather_tokens {

constexpr int kGatherBlocks = 4;  // CTAs per SM: without this ptxas spills to fit more

template <typename T>
__global__ void __launch_bounds__(kRowThreads, kGatherBlocks)
    gather_tokens_kernel(const __grid_constant__ GatherTokensParams p,
                         const __grid_constant__ FastDivmod tokens) {
  const int64_t k = row_of_thread();
  if (k >= p.entries) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const int id = p.indices[b * p.indices_batch + k];
    const char* from = nullptr;
    if (id >= 0 && id < p.rows) {
      const int s = p.flat ? tokens.divide(id) : 0;
      from = p.x + (b + s) * p.x_batch + (id - s * int64_t{tokens.value}) * p.x_token;
    }
    copy_row(reinterpret_cast<T*>(p.out + b * p.out_batch + k * p.out_row),
             reinterpret_cast<const T*>(from), p.row_bytes / sizeof(T), threadIdx.x, blockDim.x);
  }
}

}  // namespace tokenmill::cuda::gather_tokens
