#include "dense/attention/kernel_backward_launch.cuh"

namespace tokenmill::cuda {

template const char* launch_pairs<float, Mode::general>(const BackwardArgs&, cudaStream_t);

}  // namespace tokenmill::cuda
