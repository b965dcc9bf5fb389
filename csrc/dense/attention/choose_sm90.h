// Entry to the sm_90a forward for files that choose between kernels, where the build has it.
#pragma once
#include "cuda/capability.h"
#include "dense/attention/launch_sm90.h"

namespace tokenmill::cuda {

template <typename T>
const char* launch_on_sm90(const AttentionParams& p, const KvCache& cache, cudaStream_t stream) {
  if constexpr (kHasSm90) {
    if (p.map == ScoreMap::softmax)
      return launch_forward_sm90<T, Weights::softmax>(p, cache, stream);
    return launch_forward_sm90<T, Weights::sigmoid>(p, cache, stream);
  }
  return kNotMapped;
}

// Launches a call that takes_sm90() accepts. Returns null, kNotMapped, or an error message.
inline const char* launch_on_sm90(const AttentionParams& p, const KvCache& cache,
                                  cudaStream_t stream) {
  return p.dtype == DType::float16 ? launch_on_sm90<__half>(p, cache, stream)
                                   : launch_on_sm90<__nv_bfloat16>(p, cache, stream);
}

}  // namespace tokenmill::cuda
