// Stream work: executed at once, or recorded while a stream is captured into a graph.
#pragma once
#include <chrono>
#include <functional>
#include <memory>

#include "ptxvm/cudart.h"

namespace ptxvm {

using Work = std::function<cudaError_t()>;
struct Capture;

// Executes the work, without holding the runtime's mutex, or records it if the stream is being
// captured.
cudaError_t submit(cudaStream_t, Work);
bool is_captured(cudaStream_t);

// Return value of a call that is not allowed during capture: a CUDA error, which ends the capture
// without a graph. `stream`: the stream that the call waits for, if there is one.
cudaError_t forbid_in_capture(const char* function);
cudaError_t forbid_in_capture(const char* function, cudaStream_t stream);
// A call that a GPU allows in a captured stream and the machine does not: the capture continues.
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
  std::shared_ptr<ptxvm::Capture> capture{};  // capture in which it was last recorded
  CUstream_st* stream{};                      // stream of that record
  uint64_t work = 0;  // amount of the stream's work in that capture before the event
};

namespace ptxvm {

// Null for the handles of the legacy default stream; each thread has its own cudaStreamPerThread.
CUstream_st* object_of(cudaStream_t);

// record_event records an event in a stream; wait_for_event makes a stream wait for it, which adds
// the stream to the event's capture.
cudaError_t record_event(cudaEvent_t, cudaStream_t);
cudaError_t wait_for_event(cudaStream_t, cudaEvent_t);
// Destruction of a stream: a capture that it is part of ends without a graph.
void leave_capture(CUstream_st&);

}  // namespace ptxvm
