#include "cuda/launch.cuh"
#include "select/query_similarity_gate/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const SimilarityGateParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::launch<cuda::gate_kernel<T>>(p.batch, cuda::kGateThreads, 0,
                                              static_cast<cudaStream_t>(stream), p);
  });
}

}  // namespace tokenmill
