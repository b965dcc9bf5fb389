#include "select/block_pool_keys/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const PoolParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::launch_pool<T>(p, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
