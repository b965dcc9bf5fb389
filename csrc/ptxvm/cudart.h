// The CUDA runtime's own declarations, exported whatever the default visibility.
#pragma once
#pragma GCC visibility push(default)
#include <cuda_runtime_api.h>
#pragma GCC visibility pop

#include "ptxvm/runtime.h"

#define PTXVM_EXPORT extern "C" __attribute__((visibility("default")))

namespace ptxvm {

inline cudaError_t refuse(cudaError_t error, const std::string& report) {
  return static_cast<cudaError_t>(fail(error, report));
}

}  // namespace ptxvm
