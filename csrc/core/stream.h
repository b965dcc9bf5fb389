// Launches on the device of an array, on the stream on which its owner works.
#pragma once
#include <stdexcept>
#include <string>

#include "core/array.h"

namespace tokenmill {

#if defined(TOKENMILL_EMULATED)
class CudaScope {
 public:
  explicit CudaScope(const View&) {}
  void* stream() const { return nullptr; }

 private:
  emulated::Registration registration_;
};
#elif defined(TOKENMILL_WITH_CUDA)
// In cuda/launch.cu. The first makes a device current and returns the one that was; it throws.
int use_device(int device);
void restore_device(int device);

// Makes the device of an array current for its lifetime.
class CudaScope {
 public:
  explicit CudaScope(const View& on) : before_(use_device(on.device)), on_(on) {}
  ~CudaScope() {
    if (before_ != on_.device) restore_device(before_);
  }
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;
  void* stream() const { return on_.framework->stream(on_.device); }

 private:
  int before_;
  const View& on_;
};
#endif

#if defined(TOKENMILL_WITH_CUDA)
// launch_cuda(p, stream), which returns what went wrong or null.
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
