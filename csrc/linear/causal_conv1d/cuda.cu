#include "cuda/launch.cuh"
#include "linear/causal_conv1d/kernel.cuh"

namespace tokenmill {
namespace {

using namespace cuda::causal_conv1d;

constexpr int kMaxTile = 64, kMinTile = 16;  // tokens of a block

template <typename T, int kVector, int kTaps>
const char* launch_forward(const CausalConv1dParams& p, cudaStream_t stream) {
  const int slices = static_cast<int>(ceil_div(p.channels, kThreads * kVector));
  int tile = kMaxTile;
  while (tile > kMinTile && ceil_div(p.rows, tile) * slices < 2 * cuda::multiprocessors())
    tile /= 2;
  return cuda::launch<conv_forward_kernel<T, kVector, kTaps>>(ceil_div(p.rows, tile) * slices,
                                                              kThreads, 0, stream, p, tile, slices);
}

template <typename T, int kTaps>
const char* launch_vectors(const CausalConv1dParams& p, cudaStream_t stream) {
  const bool vector = cuda::is_vectorizable<T>(p.x.data, p.channels, p.x.batch, p.x.seq) &&
                      cuda::is_vectorizable<T>(p.out.data, p.channels, p.out.batch, p.out.seq);
  return vector ? launch_forward<T, cuda::conv::kChannels<T, kTaps>, kTaps>(p, stream)
                : launch_forward<T, 1, kTaps>(p, stream);
}

}  // namespace

const char* launch_cuda(const CausalConv1dParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() -> const char* {
    if (p.rows > 0 && p.channels > 0) {
      const char* error =
          p.filter.width <= 4 ? launch_vectors<T, 4>(p, s) : launch_vectors<T, 8>(p, s);
      if (error) return error;
    }
    if (!p.final.data) return nullptr;
    const int slices = static_cast<int>(ceil_div(p.channels, kThreads));
    return cuda::launch<conv_final_kernel<T>>(p.batch * slices, kThreads, 0, s, p, slices);
  });
}

}  // namespace tokenmill
