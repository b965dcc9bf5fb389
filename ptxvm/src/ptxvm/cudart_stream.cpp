// Streams and events: all work runs in order, at once or when a graph that captured it is launched.
#include <chrono>

#include "ptxvm/streams.h"

using namespace ptxvm;

namespace {

cudaError_t require_recorded(cudaEvent_t event, const char* function) {
  const std::lock_guard lock(runtime().mutex);
  return event->capture ? refuse(cudaErrorCapturedEvent,
                                 std::string(function) + ": the event was recorded in a capture")
                        : finish();
}

cudaError_t look_at(cudaEvent_t event, const char* function) {
  if (const auto error = require_recorded(event, function)) return error;
  return finish(forbid_in_capture(function));
}

struct ThreadStream : CUstream_st {
  ThreadStream() : CUstream_st{} {}
  ~ThreadStream() { leave_capture(*this); }
};

}  // namespace

namespace ptxvm {

CUstream_st* object_of(cudaStream_t stream) {
  if (stream == cudaStreamLegacy) return nullptr;
  if (stream != cudaStreamPerThread) return stream;
  static thread_local ThreadStream own;
  return &own;
}

}  // namespace ptxvm

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = new CUstream_st{flags, priority};
  return finish();
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (CUstream_st* const object = object_of(stream); object && stream != cudaStreamPerThread) {
    leave_capture(*object);
    delete object;
  }
  return finish();
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return forbid_in_capture("cudaStreamSynchronize", stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return forbid_in_capture("cudaStreamQuery", stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return wait_for_event(stream, event);
}
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return cudaGetDevice(device); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  const CUstream_st* const object = object_of(stream);
  *priority = object ? object->priority : 0;
  return finish();
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  const CUstream_st* const object = object_of(stream);
  *flags = object ? object->flags : 0;
  return finish();
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return submit(stream, [function, data] {
    function(data);
    return finish();
  });
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data,
                                  unsigned) {
  return submit(stream, [=] {
    function(stream, finish(), data);
    return finish();
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{std::chrono::steady_clock::now()};
  return finish();
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return record_event(event, stream);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return record_event(event, stream);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return look_at(event, "cudaEventSynchronize");
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return look_at(event, "cudaEventQuery"); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (const cudaEvent_t event : {start, end})
    if (const auto error = require_recorded(event, "cudaEventElapsedTime")) return error;
  *milliseconds = std::chrono::duration<float, std::milli>(end->recorded - start->recorded).count();
  return finish();
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return finish();
}

PTXVM_PER_THREAD(cudaStreamSynchronize, _ptsz);
PTXVM_PER_THREAD(cudaStreamQuery, _ptsz);
PTXVM_PER_THREAD(cudaStreamWaitEvent, _ptsz);
PTXVM_PER_THREAD(cudaLaunchHostFunc, _ptsz);
PTXVM_PER_THREAD(cudaEventRecord, _ptsz);
PTXVM_PER_THREAD(cudaEventRecordWithFlags, _ptsz);
PTXVM_PER_THREAD(cudaStreamAddCallback, _ptsz);
PTXVM_PER_THREAD(cudaStreamGetDevice, _ptsz);
PTXVM_PER_THREAD(cudaStreamGetFlags, _ptsz);
PTXVM_PER_THREAD(cudaStreamGetPriority, _ptsz);
