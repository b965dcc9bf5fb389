#include "linear/delta_attention/kernel_backward.cuh"
#include "linear/delta_attention/kernel_pairs.cuh"
#include "linear/delta_attention/launch.cuh"

namespace tokenmill {
namespace {

using namespace cuda::delta_attention;

template <typename T, bool kPerChannel, bool kCorrects>
const char* launch_backward(const DeltaAttentionBackwardParams& p, cudaStream_t stream) {
  const DeltaAttentionParams& f = p.forward;
  const Scratch scratch = scratch_of<T>(f, true).scratch;
  const int64_t bytes = sweep_bytes(f.head_dim), tokens = rows_in(f);
  if (const char* error = cuda::launch<delta_pairs_kernel<T, kPerChannel, kCorrects>>(
          chunk_blocks(f), kThreads, 0, stream, f, scratch))
    return error;
  if (const char* error = cuda::launch<delta_states_kernel<T, kPerChannel, kCorrects, true>>(
          sweep_blocks(f), kThreads, bytes, stream, f, scratch))
    return error;
  if (const char* error = cuda::launch<delta_gradients_kernel<T, kPerChannel, kCorrects>>(
          sweep_blocks(f), kThreads, bytes, stream, p, scratch, tokens))
    return error;
  if (const char* error = cuda::launch<delta_chunk_kernel<T, kPerChannel, kCorrects>>(
          chunk_blocks(f), kThreads, chunk_bytes(kPerChannel), stream, p, scratch, tokens))
    return error;
  return cuda::launch<delta_finish_kernel<T>>(ceil_div(tokens * f.key_heads, kWarps), kThreads, 0,
                                              stream, p, scratch, tokens);
}

}  // namespace

int64_t workspace_bytes(const DeltaAttentionBackwardParams& p) {
  return 4 * scratch_of<float>(p.forward, true).floats;
}

const char* launch_cuda(const DeltaAttentionBackwardParams& p, void* stream) {
  return visit_rule(p.forward, [&]<typename T, bool kPerChannel, bool kCorrects>() {
    return launch_backward<T, kPerChannel, kCorrects>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
