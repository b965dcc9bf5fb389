// Launch of the sm_80 forward.
#include "attention/forward_kernel.cuh"
#include "dense/attention/launch.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket>
const char* launch_bucket(const AttentionParams& p, const MaskBounds& bounds, cudaStream_t stream) {
  if (needs_general(p)) return launch_forward<T, kBucket, Weights::any, true>(p, bounds, stream);
  if constexpr (sizeof(T) == 4) {
    return launch_forward<T, kBucket, Weights::any, false>(p, bounds, stream);
  } else {
    switch (weights_of(p)) {
      case Weights::softmax:
        return launch_forward<T, kBucket, Weights::softmax, false>(p, bounds, stream);
      case Weights::sigmoid:
        return launch_forward<T, kBucket, Weights::sigmoid, false>(p, bounds, stream);
      case Weights::fast_sigmoid:
        return launch_forward<T, kBucket, Weights::fast_sigmoid, false>(p, bounds, stream);
      default:
        return launch_forward<T, kBucket, Weights::elementwise, false>(p, bounds, stream);
    }
  }
}

template <typename T>
const char* launch_forward(const AttentionParams& p, const MaskBounds& bounds,
                           cudaStream_t stream) {
  return visit_forward_bucket(
      p, [&]<int kBucket>(Index<kBucket>) { return launch_bucket<T, kBucket>(p, bounds, stream); });
}

template const char* launch_forward<TOKENMILL_ELEMENT>(const AttentionParams&, const MaskBounds&,
                                                       cudaStream_t);

}  // namespace tokenmill::cuda
