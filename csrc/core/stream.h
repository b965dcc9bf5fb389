// Launches on the device of an array, on the current stream of its framework.
#pragma once
#include <concepts>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/array.h"
#include "core/kernels.h"

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
#endif

template <typename Params>
concept HasTable = requires(const Params& p) {
  { kernels_of(p) } -> std::same_as<std::span<const Kernel<Params>>>;
};

// Ends a question with the rows that were added to it.
struct Answered {};

// Calls launch_cuda(p, stream), which returns an error message or null. A question about the call
// ends at the first launch with a table, and passes others. A build without CUDA only answers
// questions.
template <typename Params>
void launch_on_device(const char* op, const View& first, const Params& p) {
  if (Inquiry* const inquiry = first.framework->inquiry()) [[unlikely]] {
    if constexpr (HasTable<Params>) {
      inquiry->answer(kernels_of(p), p);
      throw Answered();
    }
    return;
  }
#if defined(TOKENMILL_WITH_CUDA)
  CudaScope scope(first);
  if (const char* error = launch_cuda(p, scope.stream()))
    throw std::runtime_error("tokenmill." + std::string(op) + ": " + error);
#else
  std::abort();
#endif
}

// workspace_bytes(p) on the device of an array; 0 for a question.
template <typename Params>
int64_t workspace_on_device(const View& first, const Params& p) {
  if (first.framework->inquiry()) return 0;
#if defined(TOKENMILL_WITH_CUDA)
  return (CudaScope(first), workspace_bytes(p));
#else
  std::abort();
#endif
}

// launch_on_device with workspace_bytes(p) bytes at `workspace`, a field of p.
template <typename Params, typename T>
void launch_with_workspace(const char* op, const View& first, Params& p, T*& workspace) {
  Array memory = empty({workspace_on_device(first, p)}, first, ScalarType::Byte);
  workspace = static_cast<T*>(memory.mutable_data());
  launch_on_device(op, first, p);
}

}  // namespace tokenmill
