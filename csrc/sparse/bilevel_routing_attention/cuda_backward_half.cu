#include "sparse/bilevel_routing_attention/cuda_backward_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_BILEVEL_GRADIENTS(__half)

}  // namespace tokenmill::cuda
