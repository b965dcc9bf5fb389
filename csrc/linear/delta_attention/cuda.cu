#include "linear/delta_attention/kernel.cuh"
#include "linear/delta_attention/kernel_pairs.cuh"
#include "linear/delta_attention/launch.cuh"

namespace tokenmill {
namespace {

using namespace cuda::delta_attention;

template <typename T, bool kPerChannel>
const char* launch_forward(const DeltaAttentionParams& p, cudaStream_t stream) {
  const Scratch scratch = scratch_of<T>(p, false).scratch;
  if (const char* error = cuda::launch<delta_pairs_kernel<T, kPerChannel>>(
          chunk_blocks(p), kThreads, 0, stream, p, scratch))
    return error;
  return cuda::launch<delta_states_kernel<T, kPerChannel, false>>(
      sweep_blocks(p), kThreads, sweep_bytes(p.head_dim), stream, p, scratch);
}

}  // namespace

int64_t workspace_bytes(const DeltaAttentionParams& p) {
  return 4 * scratch_of<float>(p, false).floats;
}

const char* launch_cuda(const DeltaAttentionParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const auto s = static_cast<cudaStream_t>(stream);
    return p.per_channel ? launch_forward<T, true>(p, s) : launch_forward<T, false>(p, s);
  });
}

}  // namespace tokenmill
