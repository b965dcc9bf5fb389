#include "dense/attention/cuda_instances.cuh"

namespace tokenmill::cuda {

template const char* launch_forward<float>(const AttentionParams&, cudaStream_t);

}  // namespace tokenmill::cuda
