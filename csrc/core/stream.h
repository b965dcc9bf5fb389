// Launches on the device of an array, on the current stream of its framework.
#pragma once
#include <stdexcept>
#include <string>

#include "core/array.h"

namespace tokenmill {

#if defined(TOKENMILL_WITH_CUDA)
// Makes the device of an array current during its lifetime. In the emulated library, passes the
// noted memory to the machine, which this thread then uses exclusively.
class CudaScope {
 public:
  explicit CudaScope(const View& on);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
  void* stream() const;

 private:
  int before_ = 0;
  const View& on_;
};

// Calls launch_cuda(p, stream), which returns an error message or null.
template <typename Params>
void launch_on_device(const char* op, const View& first, const Params& p) {
  CudaScope scope(first);
  if (const char* error = launch_cuda(p, scope.stream()))
    throw std::runtime_error("tokenmill." + std::string(op) + ": " + error);
}

// The same, with workspace_bytes(p) bytes at `workspace`, a field of p.
template <typename Params, typename T>
void launch_with_workspace(const char* op, const View& first, Params& p, T*& workspace) {
  const int64_t bytes = (CudaScope(first), workspace_bytes(p));
  Array memory = empty({bytes}, first, ScalarType::Byte);
  workspace = static_cast<T*>(memory.mutable_data());
  launch_on_device(op, first, p);
}
#endif

}  // namespace tokenmill
