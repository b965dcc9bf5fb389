#include "cuda/launch.cuh"
#include "select/query_similarity_gate/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const SimilarityGateParams& p, void* stream) {
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::launch<cuda::query_similarity_gate::gate_kernel<T>>(
        p.batch, cuda::query_similarity_gate::kGateThreads, 0, static_cast<cudaStream_t>(stream),
        p);
  });
}

}  // namespace tokenmill
