// CUDA device and stream of the caller, for the CUDA half of a host.cpp.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "core/views.h"

// Lives in libtorch_cuda.so. Weak, so that one library also loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace tokenmill {

#if defined(TOKENMILL_EMULATED)
class CudaScope {
 public:
  explicit CudaScope(int32_t) {}
  void* stream() const { return nullptr; }

 private:
  emulated::Registration registration_;
};
#else
// Makes `device` current for its lifetime and names the stream that torch uses there.
class CudaScope {
 public:
  explicit CudaScope(int32_t device) : guard_(device) {
    if (!aoti_torch_get_current_cuda_stream)
      throw std::runtime_error("tokenmill: this torch has no CUDA support");
    if (aoti_torch_get_current_cuda_stream(device, &stream_) != 0)
      throw std::runtime_error("tokenmill: no current CUDA stream");
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

#if defined(TOKENMILL_WITH_CUDA)
// launch_cuda(p, stream), which returns what went wrong or null, on the device of `first`.
template <typename Params>
void launch_on_device(const char* op, const View& first, const Params& p) {
  CudaScope scope(first.device);
  if (const char* error = launch_cuda(p, scope.stream()))
    throw std::runtime_error("tokenmill." + std::string(op) + ": " + error);
}
#endif

}  // namespace tokenmill
