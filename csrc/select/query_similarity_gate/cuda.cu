#include "select/query_similarity_gate/kernel.cuh"

namespace tokenmill {

const char* launch_cuda(const SimilarityGateParams& p, void* stream) {
  if (p.batch > 0x7fffffff) return "too many requests for a launch";
  cuda::visit_dtype(p.dtype, [&]<typename T>() {
    cuda::gate_kernel<T><<<static_cast<unsigned>(p.batch), cuda::kGateThreads, 0,
                           static_cast<cudaStream_t>(stream)>>>(p);
  });
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace tokenmill
