#include "cuda/launch.cuh"
#include "linear/delta_attention_decode/kernel.cuh"

namespace tokenmill {
namespace {

template <typename T, int kVector>
const char* launch_decode(const DeltaDecodeParams& p, cudaStream_t stream) {
  namespace decode = cuda::delta_attention_decode;
  const int64_t slices = ceil_div(p.value_dim, decode::kLanes * kVector);
  return cuda::launch<decode::delta_decode_kernel<T, kVector>>(
      p.batch * p.heads * slices, decode::kThreads, 0, stream, p, static_cast<int>(slices));
}

}  // namespace

const char* launch_cuda(const DeltaDecodeParams& p, void* stream) {
  if (p.batch == 0 || p.heads == 0 || p.seqlen == 0) return nullptr;
  const bool vector =
      cuda::is_vectorizable<float>(p.state.data, p.value_dim, p.state.sequence, p.state.head);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    return vector ? launch_decode<T, 4>(p, s) : launch_decode<T, 1>(p, s);
  });
}

}  // namespace tokenmill
