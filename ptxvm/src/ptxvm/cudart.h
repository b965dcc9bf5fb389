// The CUDA runtime's own declarations, exported whatever the default visibility.
#pragma once
#pragma GCC visibility push(default)
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

#include "ptxvm/runtime.h"

#define PTXVM_EXPORT extern "C" __attribute__((visibility("default")))

namespace ptxvm {

// Return value of a call: the error of a kernel that failed before it, if there is one.
inline cudaError_t finish(cudaError_t error = cudaSuccess) {
  const int fault = device_error();
  return fault ? static_cast<cudaError_t>(fault) : error;
}

inline cudaError_t refuse(cudaError_t error, const std::string& report) {
  if (const auto fault = finish()) return fault;
  return static_cast<cudaError_t>(fail(error, report));
}

}  // namespace ptxvm

// Names that code compiled with per-thread default streams calls. Work has only one order.
#define PTXVM_PER_THREAD(function, suffix) \
  extern "C"                               \
      __attribute__((visibility("default"), alias(#function))) decltype(function) function##suffix
