#include "dense/attention/cuda_instances.cuh"

namespace tokenmill::cuda {

template const char* launch_forward<__nv_bfloat16>(const AttentionParams&, cudaStream_t);

}  // namespace tokenmill::cuda
