#include "dense/attention/launch_sm90.h"

#if defined(TOKENMILL_SM90)
namespace tokenmill::cuda {

const char* launch_on_sm90(const Masked<AttentionParams>& m, void* stream) {
  return launch_forward_sm90(m.params, {}, static_cast<cudaStream_t>(stream));
}

}  // namespace tokenmill::cuda
#endif
