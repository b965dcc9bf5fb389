// The instances of the recurrence for one element type.
#pragma once
#include "linear/linear_attention/cuda_launch.cuh"

namespace tokenmill::cuda {

template <typename T>
const char* launch_recurrence(const Recurrence& p, const RecurrencePlan& plan,
                              cudaStream_t stream) {
  if (p.taylor) return launch_instance<T, 64, true>(p, plan, stream);
  switch (bucket_of(p)) {
    case 64:
      return launch_instance<T, 64, false>(p, plan, stream);
    case 128:
      return launch_instance<T, 128, false>(p, plan, stream);
    default:
      return launch_instance<T, 256, false>(p, plan, stream);
  }
}

}  // namespace tokenmill::cuda
