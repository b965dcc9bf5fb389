#include "sparse/bilevel_routing_attention/cuda_plan.cuh"

namespace tokenmill {
const char* launch_cuda(const BilevelParams& d, void* stream) {
  if (const char* error = cuda::bilevel_routing_attention::check_sizes(d)) return error;
  return cuda::visit_dtype(d.attention.dtype, [&]<typename T>() {
    return cuda::bilevel_routing_attention::launch_bilevel<T>(
        cuda::bilevel_routing_attention::plan_regions(d), static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
