#include "dense/attention/launch_sm90.h"

#if defined(TOKENMILL_SM90)
namespace tokenmill::cuda {

const char* launch_forward_sm90(const AttentionParams& p, const KvCache& cache,
                                cudaStream_t stream) {
  const bool softmax = p.map == ScoreMap::softmax;
  if (p.dtype == DType::float16)
    return softmax ? launch_forward_sm90<__half, Weights::softmax>(p, cache, stream)
                   : launch_forward_sm90<__half, Weights::sigmoid>(p, cache, stream);
  return softmax ? launch_forward_sm90<__nv_bfloat16, Weights::softmax>(p, cache, stream)
                 : launch_forward_sm90<__nv_bfloat16, Weights::sigmoid>(p, cache, stream);
}

const char* launch_on_sm90(const Masked<AttentionParams>& m, void* stream) {
  return launch_forward_sm90(m.params, {}, static_cast<cudaStream_t>(stream));
}

}  // namespace tokenmill::cuda
#endif
