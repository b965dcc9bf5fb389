#include "select/block_pool_keys/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const PoolParams& p, void* stream) {
  const char* error = nullptr;
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    error = cuda::launch_pool<T>(p, static_cast<cudaStream_t>(stream));
  });
  return error;
}

}  // namespace tokenmill
