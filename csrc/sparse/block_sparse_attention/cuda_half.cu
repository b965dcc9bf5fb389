#include "sparse/block_sparse_attention/cuda_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_BLOCK_SPARSE_INSTANCES(__half)

}  // namespace tokenmill::cuda
