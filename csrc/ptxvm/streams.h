// Work of streams: it is done at once, or recorded while a stream is captured into a graph.
#pragma once
#include <chrono>
#include <functional>
#include <memory>

#include "ptxvm/cudart.h"

namespace ptxvm {

using Work = std::function<cudaError_t()>;
struct Capture;

// Does the work, or records it if the stream is being captured.
cudaError_t submit(cudaStream_t, Work);

// What a call returns that may not come while work is captured: a CUDA error, which ends the
// capture without a graph. `stream`: the one that the call waits for, if it is one.
cudaError_t forbid_in_capture(const char* function);
cudaError_t forbid_in_capture(const char* function, cudaStream_t stream);

}  // namespace ptxvm

struct CUstream_st {
  unsigned flags;
  int priority;
  std::shared_ptr<ptxvm::Capture> capture{};  // null: none
};

struct CUevent_st {
  std::chrono::steady_clock::time_point recorded;
  std::shared_ptr<ptxvm::Capture> capture{};  // in which it was recorded last
  cudaStream_t stream{};                      // of that
};

namespace ptxvm {

// Null for the handles that stand for default streams.
inline CUstream_st* object_of(cudaStream_t stream) {
  return stream == cudaStreamLegacy || stream == cudaStreamPerThread ? nullptr : stream;
}

// An event is recorded in a captured stream, or one waits for it: true if it belongs to a capture,
// into which the stream is then drawn.
bool record_in_capture(cudaEvent_t, cudaStream_t);
cudaError_t wait_in_capture(cudaStream_t, cudaEvent_t);
// A stream is destroyed: a capture that it is part of ends without a graph.
void leave_capture(CUstream_st&);

}  // namespace ptxvm
