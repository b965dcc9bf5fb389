#include "core/fill.h"
#include "cuda/launch.cuh"

namespace tokenmill {
namespace cuda::fill {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) fill(T* data, int64_t count, T value) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) data[i] = value;
}

template <typename T>
const char* launch_fill(const FillParams& p, cudaStream_t stream) {
  return launch<fill<T>>((p.count + kThreads - 1) / kThreads, kThreads, 0, stream,
                         static_cast<T*>(p.data), p.count, static_cast<T>(p.bits));
}

}  // namespace cuda::fill

const char* launch_cuda(const FillParams& p, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  return p.element_bytes == 2 ? cuda::fill::launch_fill<uint16_t>(p, queue)
                              : cuda::fill::launch_fill<uint32_t>(p, queue);
}

}  // namespace tokenmill
