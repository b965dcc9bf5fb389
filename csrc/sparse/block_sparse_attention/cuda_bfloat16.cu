#include "sparse/block_sparse_attention/cuda_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_BLOCK_SPARSE_INSTANCES(__nv_bfloat16)

}  // namespace tokenmill::cuda
