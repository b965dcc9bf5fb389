#include "sparse/block_sparse_attention/cuda_backward_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_BLOCK_SPARSE_GRADIENTS(float)

}  // namespace tokenmill::cuda
