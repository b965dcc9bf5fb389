#include "linear/delta_attention/kernel.cuh"
#include "linear/delta_attention/kernel_pairs.cuh"
#include "linear/delta_attention/launch.cuh"

namespace tokenmill {
namespace {

using namespace cuda::delta_attention;

template <typename T, bool kPerChannel, bool kCorrects>
const char* launch_forward(const DeltaAttentionParams& p, cudaStream_t stream) {
  const Scratch scratch = scratch_of<T>(p, false).scratch;
  if (const char* error = cuda::launch<delta_pairs_kernel<T, kPerChannel, kCorrects>>(
          chunk_blocks(p), kThreads, 0, stream, p, scratch))
    return error;
  return cuda::launch<delta_states_kernel<T, kPerChannel, kCorrects, false>>(
      sweep_blocks(p), kThreads, sweep_bytes(p.head_dim), stream, p, scratch);
}

}  // namespace

int64_t workspace_bytes(const DeltaAttentionParams& p) {
  return 4 * scratch_of<float>(p, false).floats;
}

const char* launch_cuda(const DeltaAttentionParams& p, void* stream) {
  return visit_rule(p, [&]<typename T, bool kPerChannel, bool kCorrects>() {
    return launch_forward<T, kPerChannel, kCorrects>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
