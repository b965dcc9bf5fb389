// The instances of the forward for one element type.
#pragma once
#include "dense/attention/cuda_launch.cuh"

namespace tokenmill::cuda {

template <typename T>
const char* launch_forward(const AttentionParams& p, cudaStream_t stream) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 32) return launch_bucket<T, 32>(p, stream);
  if (dim <= 64) return launch_bucket<T, 64>(p, stream);
  if (dim <= 96) return launch_bucket<T, 96>(p, stream);
  if (dim <= 128) return launch_bucket<T, 128>(p, stream);
  if (dim <= 192) return launch_bucket<T, 192>(p, stream);
  return launch_bucket<T, 256>(p, stream);
}

}  // namespace tokenmill::cuda
