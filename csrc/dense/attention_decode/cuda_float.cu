#include "dense/attention_decode/cuda_launch.cuh"

namespace tokenmill::cuda {

TOKENMILL_DECODE_INSTANCES(float)

}  // namespace tokenmill::cuda
