#include "cuda/launch.cuh"
#include "linear/causal_conv1d/kernel_backward.cuh"

namespace tokenmill {
namespace {

using namespace cuda::causal_conv1d;

constexpr int kTile = 16;  // tokens of a block

template <typename T, int kVector, int kTaps>
const char* launch_backward(const CausalConv1dBackwardParams& params, cudaStream_t stream) {
  const CausalConv1dParams& p = params.forward;
  const int slices = static_cast<int>(ceil_div(p.channels, kThreads * kVector));
  if (const char* error = cuda::launch<conv_filter_kernel<T, kVector, kTaps>>(
          ceil_div(p.rows, params.part_rows) * slices, kThreads, 0, stream, params, slices))
    return error;
  return cuda::launch<conv_input_kernel<T, kVector, kTaps>>(
      ceil_div(p.rows, kTile) * slices, kThreads, 0, stream, params, kTile, slices);
}

template <typename T, int kTaps>
const char* launch_vectors(const CausalConv1dBackwardParams& params, cudaStream_t stream) {
  const CausalConv1dParams& p = params.forward;
  const auto fits = [&](const ConvRows& r) {
    return cuda::is_vectorizable<T>(r.data, p.channels, r.batch, r.seq);
  };
  const bool vector = fits(p.x) && fits(params.dout) && fits(params.dx);
  return vector ? launch_backward<T, kGradientChannels, kTaps>(params, stream)
                : launch_backward<T, 1, kTaps>(params, stream);
}

}  // namespace

const char* launch_cuda(const CausalConv1dBackwardParams& params, void* stream) {
  const CausalConv1dParams& p = params.forward;
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() -> const char* {
    if (p.rows > 0) {
      const char* error =
          p.filter.width <= 4 ? launch_vectors<T, 4>(params, s) : launch_vectors<T, 8>(params, s);
      if (error) return error;
    }
    const int slices = static_cast<int>(ceil_div(p.channels, kThreads));
    if (params.dinitial.data) {
      const char* error =
          cuda::launch<conv_initial_kernel<T>>(p.batch * slices, kThreads, 0, s, params, slices);
      if (error) return error;
    }
    const dim3 grid(static_cast<unsigned>(slices), static_cast<unsigned>(p.filter.width + 1));
    return cuda::launch<conv_parts_kernel>(grid, kThreads, 0, s, params,
                                           ceil_div(p.rows, params.part_rows));
  });
}

}  // namespace tokenmill
