// Streams and events: all work runs in order, at once. Nothing is captured into graphs.
#include <chrono>
#include <utility>

#include "ptxvm/cudart.h"

using namespace ptxvm;

struct CUstream_st {
  unsigned flags;
  int priority;
};

struct CUevent_st {
  std::chrono::steady_clock::time_point recorded;
};

namespace {

cudaError_t record(cudaEvent_t event) {
  event->recorded = std::chrono::steady_clock::now();
  return finish();
}

cudaError_t refuse_graph(const char* function) {
  return refuse(cudaErrorNotSupported,
                std::string(function) + ": the machine does not capture streams into graphs");
}

}  // namespace

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
  delete stream;
  return finish();
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return finish(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return finish(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return finish(); }
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) { return cudaGetDevice(device); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream ? stream->priority : 0;
  return finish();
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream ? stream->flags : 0;
  return finish();
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return finish();
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t* dependencies) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (dependencies) *dependencies = 0;
  return finish();
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return refuse_graph("cudaStreamBeginCapture");
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode) {
  return refuse_graph("cudaStreamBeginCaptureToGraph");
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) {
  return refuse_graph("cudaStreamEndCapture");
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*,
                                                const cudaGraphEdgeData*, size_t, unsigned) {
  return refuse_graph("cudaStreamUpdateCaptureDependencies");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(current, *mode);
  return finish();
}
cudaError_t cudaGraphCreate(cudaGraph_t*, unsigned) { return refuse_graph("cudaGraphCreate"); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) {
  return refuse_graph("cudaGraphInstantiate");
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t*, cudaGraph_t, unsigned long long) {
  return refuse_graph("cudaGraphInstantiateWithFlags");
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return refuse_graph("cudaGraphUpload");
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  return refuse_graph("cudaGraphLaunch");
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return refuse_graph("cudaGraphExecDestroy"); }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return refuse_graph("cudaGraphDestroy"); }

cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return finish();
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{std::chrono::steady_clock::now()};
  return finish();
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return record(event); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  return record(event);
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return finish(); }
cudaError_t cudaEventQuery(cudaEvent_t) { return finish(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
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
PTXVM_PER_THREAD(cudaStreamIsCapturing, _ptsz);
PTXVM_PER_THREAD(cudaStreamGetCaptureInfo, _ptsz);
PTXVM_PER_THREAD(cudaStreamBeginCapture, _ptsz);
PTXVM_PER_THREAD(cudaStreamEndCapture, _ptsz);
PTXVM_PER_THREAD(cudaGraphLaunch, _ptsz);
PTXVM_PER_THREAD(cudaLaunchHostFunc, _ptsz);
PTXVM_PER_THREAD(cudaEventRecord, _ptsz);
PTXVM_PER_THREAD(cudaEventRecordWithFlags, _ptsz);
