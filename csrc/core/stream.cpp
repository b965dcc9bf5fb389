#include "core/stream.h"

namespace tokenmill {

#if defined(TOKENMILL_WITH_CUDA)
// Defined in cuda/launch.cu. use_device makes a device current and returns the previous one; it
// throws.
int use_device(int device);
void restore_device(int device);

CudaScope::CudaScope(const View& on) : before_(use_device(on.device)), on_(on) {}
CudaScope::~CudaScope() {
  if (before_ != on_.device) restore_device(before_);
}
void* CudaScope::stream() const { return on_.framework->stream(on_.device); }
#endif

#if defined(TOKENMILL_PTXVM)
namespace emulated {

Frame::Frame() {}
Frame::~Frame() {}
void note(const void*, int64_t, bool) {}

}  // namespace emulated
#endif

}  // namespace tokenmill
