#include "dense/attention_decode/cuda_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_DECODE_INSTANCES(__half)

}  // namespace tokenmill::cuda
