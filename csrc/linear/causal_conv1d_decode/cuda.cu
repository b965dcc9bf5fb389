#include "cuda/launch.cuh"
#include "linear/causal_conv1d_decode/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const ConvDecodeParams& p, void* stream) {
  using namespace cuda::causal_conv1d_decode;
  const auto s = static_cast<cudaStream_t>(stream);
  const int slices = static_cast<int>(ceil_div(p.channels, kThreads));
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const auto launch = [&]<int kTaps, bool kQuads>() {
      return cuda::launch<conv_decode_kernel<T, kTaps, kQuads>>(p.batch * slices, kThreads, 0, s, p,
                                                                slices);
    };
    const ConvStates& state = p.state;
    const bool quads = p.columns == 4 && state.column == 1 && state.channel == 4 &&
                       state.sequence % 4 == 0 &&
                       reinterpret_cast<uintptr_t>(state.data) % sizeof(cuda::Pack<T, 4>) == 0;
    if (p.filter.width > 4) return launch.template operator()<8, false>();
    return quads ? launch.template operator()<4, true>() : launch.template operator()<4, false>();
  });
}

}  // namespace tokenmill
