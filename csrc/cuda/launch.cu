#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/driver.h"
#include "cuda/choose.h"
#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"

namespace tokenmill::cuda {
namespace {

// Keeps `text` in thread-local memory.
const char* kept(std::string text) {
  thread_local std::string last;
  last = std::move(text);
  return last.c_str();
}

const char* error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  const char* const text = cudaGetErrorString(error);
  cudaGetLastError();  // clears the error, which a later unrelated call would otherwise return
  const bool ptx = error == cudaErrorUnsupportedPtxVersion;
  if (!ptx && error != cudaErrorInsufficientDriver) return text;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  return kept(driver_text(CUDART_VERSION, driver, ptx));
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("tokenmill: ") + error_text(error));
  return value;
}

// Grants a kernel all the dynamic shared memory that the device allows a CTA, once per device: a
// limit set to the needs of each call would race with other threads.
const char* allow_shared(const void* kernel, int64_t bytes, SharedAllowance& allowed) {
  int device = 0;
  if (const char* error = error_text(cudaGetDevice(&device))) return error;
  // further devices are queried at each launch
  const bool known = device < SharedAllowance::kDevices;
  if (known && bytes <= std::atomic_ref(allowed.bytes[device]).load(std::memory_order_relaxed))
    return nullptr;
  cudaFuncAttributes attributes;
  if (const char* error = error_text(cudaFuncGetAttributes(&attributes, kernel))) return error;
  const int limit = shared_limit() - static_cast<int>(attributes.sharedSizeBytes);
  if (bytes > limit) {
    std::string text = "needs " + std::to_string(bytes) + " bytes of shared memory for a block";
    return kept(text + ", of which this device has " + std::to_string(limit));
  }
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
  if (error == cudaSuccess && known)
    std::atomic_ref(allowed.bytes[device]).store(limit, std::memory_order_relaxed);
  return error_text(error);
}

}  // namespace

const char* refuse(const char* argument, const char* rule, int64_t value) {
  return kept(std::string(argument) + ": " + rule + "; got " + std::to_string(value));
}

int compute_capability() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
         attribute(cudaDevAttrComputeCapabilityMinor);
}
int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

const char* set_bytes(void* memory, int value, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return nullptr;
  return error_text(cudaMemsetAsync(memory, value, static_cast<size_t>(bytes), stream));
}

const char* launch_kernel(const void* kernel, const LaunchShape& shape, void** arguments,
                          SharedAllowance& allowed) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return nullptr;
  if (shape.shared_bytes > 0)
    if (const char* error = allow_shared(kernel, shape.shared_bytes, allowed)) return error;
  return error_text(cudaLaunchKernel(kernel, shape.grid, shape.block, arguments,
                                     static_cast<size_t>(shape.shared_bytes), shape.stream));
}

}  // namespace tokenmill::cuda

namespace tokenmill {

int use_device(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess && before != device) error = cudaSetDevice(device);
  if (const char* text = cuda::error_text(error))
    throw std::runtime_error(std::string("tokenmill: ") + text);
  return before;
}

void restore_device(int device) { cudaSetDevice(device); }

}  // namespace tokenmill
