#include "cuda/launch.cuh"
#include "linear/causal_conv1d_decode/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const ConvDecodeParams& p, void* stream) {
  using namespace cuda::causal_conv1d_decode;
  const auto s = static_cast<cudaStream_t>(stream);
  const int slices = static_cast<int>(ceil_div(p.channels, kThreads));
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return p.filter.width <= 4
               ? cuda::launch<conv_decode_kernel<T, 4>>(p.batch * slices, kThreads, 0, s, p, slices)
               : cuda::launch<conv_decode_kernel<T, 8>>(p.batch * slices, kThreads, 0, s, p,
                                                        slices);
  });
}

}  // namespace tokenmill
