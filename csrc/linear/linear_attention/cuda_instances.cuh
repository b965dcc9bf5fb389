// The instances of the recurrence for one element type.
#pragma once
#include "linear/linear_attention/cuda_launch.cuh"

namespace tokenmill::cuda {

template <typename T>
const char* launch_recurrence(const Recurrence& p, const RecurrencePlan& plan,
                              cudaStream_t stream) {
  return visit_instance<T>(p, [&]<typename Element, int kBucket, bool kTaylor>() {
    return launch_instance<Element, kBucket, kTaylor>(p, plan, stream);
  });
}

}  // namespace tokenmill::cuda
