// Everything the host asks of the CUDA runtime: launches, memset, device properties. Every call is
// checked in launch.cu. Errors are texts, valid until the thread's next error; null: success.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace tokenmill::cuda {

constexpr int64_t kMaxGrid = 0x7fffffff;  // CTAs along x

// Properties of the current device. They throw: no plan can be made without them.
int multiprocessors();
int shared_limit();  // opt-in shared memory per CTA in bytes: 101376 on sm_86, sm_89 and sm_12x

// Sets bytes of memory to a value.
const char* set_bytes(void* memory, int value, int64_t bytes, cudaStream_t stream);

// Dynamic shared memory granted to a kernel, in bytes per device.
struct SharedAllowance {
  static constexpr int kDevices = 32;
  int bytes[kDevices];
};

struct LaunchShape {
  dim3 grid, block;
  int64_t shared_bytes;
  cudaStream_t stream;
};

const char* launch_kernel(const void* kernel, const LaunchShape& shape, void** arguments,
                          SharedAllowance& allowed);

template <typename... Params>
const char* launch_kernel(void (*kernel)(Params...), const LaunchShape& shape,
                          SharedAllowance& allowed, std::type_identity_t<Params>... args) {
  void* arguments[] = {&args...};
  return launch_kernel(reinterpret_cast<const void*>(kernel), shape, arguments, allowed);
}

// Launches kKernel(args...) with `bytes` of dynamic shared memory. An empty grid is not launched.
template <auto kKernel, typename... Args>
const char* launch(dim3 grid, dim3 block, int64_t bytes, cudaStream_t stream, const Args&... args) {
  static SharedAllowance allowed;
  return launch_kernel(kKernel, {grid, block, bytes, stream}, allowed, args...);
}

// The same for a one-dimensional grid.
template <auto kKernel, typename... Args>
const char* launch(int64_t blocks, dim3 block, int64_t bytes, cudaStream_t stream,
                   const Args&... args) {
  if (blocks > kMaxGrid) return "2^31 - 1 blocks at most on CUDA";
  return launch<kKernel>(dim3(static_cast<unsigned>(blocks)), block, bytes, stream, args...);
}

}  // namespace tokenmill::cuda
