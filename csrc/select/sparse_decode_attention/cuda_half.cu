#include "select/sparse_decode_attention/cuda_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_SPARSE_DECODE_INSTANCES(__half)

}  // namespace tokenmill::cuda
