#include "linear/linear_attention/cuda_instances.cuh"

namespace tokenmill::cuda {

template const char* launch_recurrence<__half>(const Recurrence&, const RecurrencePlan&,
                                               cudaStream_t);

}  // namespace tokenmill::cuda
