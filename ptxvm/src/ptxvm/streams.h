// Work of streams: it is done at once, or recorded while a stream is captured into a graph.
#pragma once
#include <chrono>
#include <functional>
#include <memory>

#include "ptxvm/cudart.h"

namespace ptxvm {

using Work = std::function<cudaError_t()>;
struct Capture;

// Does the work, without the runtime's mutex, or records it if the stream is being captured.
cudaError_t submit(cudaStream_t, Work);
bool is_captured(cudaStream_t);

// What a call returns that may not come while work is captured: a CUDA error, which ends the
// capture without a graph. `stream`: the one that the call waits for, if it is one.
cudaError_t forbid_in_capture(const char* function);
cudaError_t forbid_in_capture(const char* function, cudaStream_t stream);
// The same for what a GPU may do in a captured stream, and the machine does not: the capture goes
// on.
cudaError_t leave_out_of_capture(const char* function, cudaStream_t stream);

}  // namespace ptxvm

struct CUstream_st {
  unsigned flags;
  int priority;
  std::shared_ptr<ptxvm::Capture> capture{};  // null: none
};

struct CUevent_st {
  std::chrono::steady_clock::time_point recorded;
  bool is_recorded = false;
  std::shared_ptr<ptxvm::Capture> capture{};  // in which it was recorded last
  CUstream_st* stream{};                      // of that
  uint64_t work = 0;                          // of the stream in that capture, before the event
};

namespace ptxvm {

// Null for the handles of the legacy default stream; each thread has its own cudaStreamPerThread.
CUstream_st* object_of(cudaStream_t);

// An event is recorded in a stream, or one waits for it, which draws the stream into the capture
// that the event belongs to.
cudaError_t record_event(cudaEvent_t, cudaStream_t);
cudaError_t wait_for_event(cudaStream_t, cudaEvent_t);
// A stream is destroyed: a capture that it is part of ends without a graph.
void leave_capture(CUstream_st&);

}  // namespace ptxvm
