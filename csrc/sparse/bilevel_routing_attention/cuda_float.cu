#include "sparse/bilevel_routing_attention/cuda_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_BILEVEL_INSTANCES(float)

}  // namespace tokenmill::cuda
