// Graphs: the work of captured streams, in the order of its calls, which is one of those that the
// dependencies allow. Nodes are not objects here: a graph is captured, instantiated and launched.
#include <algorithm>
#include <utility>
#include <vector>

#include "ptxvm/streams.h"

using namespace ptxvm;

struct CUgraph_st {
  std::vector<Work> work;
};

struct CUgraphExec_st {
  std::vector<Work> work;
};

namespace ptxvm {

struct Capture {
  cudaGraph_t graph;
  bool is_new;  // else the caller's
  cudaStream_t origin;
  cudaStreamCaptureMode mode;
  const void* thread;  // that began it
  unsigned long long id;
  bool invalid = false;
  struct Member {
    cudaStream_t stream;
    bool joined;  // all of its work is waited for by another stream of the capture
  };
  std::vector<Member> members;
};

namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local const char thread_mark = 0;  // its address names the thread
unsigned long long captures_begun = 0;

std::vector<std::shared_ptr<Capture>>& active() {
  static auto* const captures = new std::vector<std::shared_ptr<Capture>>;
  return *captures;
}

cudaError_t invalidate(Capture& capture, cudaError_t error, const std::string& report) {
  capture.invalid = true;
  return refuse(error, report);
}

Capture::Member* member_of(Capture& capture, cudaStream_t stream) {
  const auto found = std::find_if(capture.members.begin(), capture.members.end(),
                                  [&](const auto& member) { return member.stream == stream; });
  return found == capture.members.end() ? nullptr : &*found;
}

void drop_graph(Capture& capture) {
  if (capture.is_new) delete capture.graph;
  capture.graph = nullptr;
}

void draw_in(const std::shared_ptr<Capture>& capture, cudaStream_t stream) {
  stream->capture = capture;
  if (!member_of(*capture, stream)) capture->members.push_back({stream, false});
}

cudaError_t run_all(const std::vector<Work>& work) {
  for (const Work& step : work)
    if (const auto error = step()) return error;
  return finish();
}

}  // namespace

cudaError_t submit(cudaStream_t stream, Work work) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  if (!object) {
    for (const auto& capture : active())
      if (!(capture->origin->flags & cudaStreamNonBlocking) && stream != cudaStreamPerThread)
        return invalidate(*capture, cudaErrorStreamCaptureImplicit,
                          "work of the default stream depends on a stream that is captured");
    return work();
  }
  if (!object->capture) return work();
  Capture& capture = *object->capture;
  if (capture.invalid)
    return refuse(cudaErrorStreamCaptureInvalidated, "the capture of the stream is invalid");
  member_of(capture, stream)->joined = false;
  capture.graph->work.push_back(std::move(work));
  return finish();
}

cudaError_t forbid_in_capture(const char* function) {
  const std::lock_guard lock(runtime().mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& capture : active())
    if (capture->mode == cudaStreamCaptureModeGlobal ||
        (capture->mode == cudaStreamCaptureModeThreadLocal && capture->thread == &thread_mark))
      return invalidate(*capture, cudaErrorStreamCaptureUnsupported,
                        std::string(function) + ": not while a stream is captured");
  return cudaSuccess;
}

cudaError_t forbid_in_capture(const char* function, cudaStream_t stream) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  if (!object || !object->capture) return finish();
  return invalidate(*object->capture, cudaErrorStreamCaptureUnsupported,
                    std::string(function) + ": the stream is captured");
}

bool record_in_capture(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  event->capture = object ? object->capture : nullptr;
  event->stream = stream;
  return event->capture != nullptr;
}

cudaError_t wait_in_capture(cudaStream_t stream, cudaEvent_t event) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  const auto& capture = event->capture;
  if (!capture || !capture->graph) return finish();  // or that capture has ended
  if (!object || (object->capture && object->capture != capture))
    return invalidate(*capture, cudaErrorStreamCaptureIsolation,
                      "cudaStreamWaitEvent: the event belongs to another capture");
  draw_in(capture, stream);
  auto* const other = member_of(*capture, event->stream);
  if (other && event->stream != stream) other->joined = true;
  member_of(*capture, stream)->joined = false;
  return finish();
}

void leave_capture(CUstream_st& stream) {
  const std::lock_guard lock(runtime().mutex);
  const auto capture = stream.capture;
  if (!capture) return;
  capture->invalid = true;
  std::erase_if(capture->members, [&](const auto& member) { return member.stream == &stream; });
  if (capture->origin != &stream) return;
  for (const auto& member : capture->members) member.stream->capture.reset();
  std::erase(active(), capture);
  drop_graph(*capture);
}

}  // namespace ptxvm

namespace {

cudaError_t begin(cudaStream_t stream, cudaGraph_t graph, cudaStreamCaptureMode mode) {
  const std::lock_guard lock(runtime().mutex);
  if (const auto error = finish()) return error;
  CUstream_st* const object = object_of(stream);
  if (!object)
    return refuse(cudaErrorStreamCaptureUnsupported,
                  "cudaStreamBeginCapture: a default stream cannot be captured");
  if (object->capture)
    return refuse(cudaErrorIllegalState, "cudaStreamBeginCapture: the stream is captured already");
  const auto capture = std::make_shared<Capture>();
  capture->graph = graph ? graph : new CUgraph_st;
  capture->is_new = !graph;
  capture->origin = stream;
  capture->mode = mode;
  capture->thread = &thread_mark;
  capture->id = ++captures_begun;
  draw_in(capture, stream);
  active().push_back(capture);
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(runtime().mutex);
  const CUstream_st* const object = object_of(stream);
  *status = !object || !object->capture ? cudaStreamCaptureStatusNone
            : object->capture->invalid  ? cudaStreamCaptureStatusInvalidated
                                        : cudaStreamCaptureStatusActive;
  return finish();
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* dependencies) {
  const std::lock_guard lock(runtime().mutex);
  const auto error = cudaStreamIsCapturing(stream, status);
  const bool captures = *status == cudaStreamCaptureStatusActive;
  if (id) *id = captures ? stream->capture->id : 0;
  if (graph) *graph = captures ? stream->capture->graph : nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (dependencies) *dependencies = 0;
  return error;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return begin(stream, nullptr, mode);
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                          const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                          cudaStreamCaptureMode mode) {
  return begin(stream, graph, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const std::lock_guard lock(runtime().mutex);
  *graph = nullptr;
  CUstream_st* const object = object_of(stream);
  if (!object || !object->capture)
    return refuse(cudaErrorIllegalState, "cudaStreamEndCapture: the stream is not captured");
  const auto capture = object->capture;
  if (capture->origin != stream)
    return invalidate(*capture, cudaErrorStreamCaptureUnmatched,
                      "cudaStreamEndCapture: the capture began in another stream");
  const bool unjoined =
      std::any_of(capture->members.begin(), capture->members.end(),
                  [&](const auto& member) { return member.stream != stream && !member.joined; });
  for (const auto& member : capture->members) member.stream->capture.reset();
  std::erase(active(), capture);
  if (capture->invalid || unjoined) {
    drop_graph(*capture);
    return capture->invalid
               ? refuse(cudaErrorStreamCaptureInvalidated,
                        "cudaStreamEndCapture: a call before it made the capture invalid")
               : refuse(cudaErrorStreamCaptureUnjoined,
                        "cudaStreamEndCapture: work of another stream is not waited for");
  }
  *graph = std::exchange(capture->graph, nullptr);
  return finish();
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t*,
                                                const cudaGraphEdgeData*, size_t, unsigned) {
  cudaStreamCaptureStatus status;
  if (const auto error = cudaStreamIsCapturing(stream, &status)) return error;
  return status == cudaStreamCaptureStatusActive
             ? cudaSuccess
             : refuse(cudaErrorIllegalState,
                      "cudaStreamUpdateCaptureDependencies: the stream is not captured");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(thread_mode, *mode);
  return finish();
}

cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  *graph = new CUgraph_st;
  return finish();
}
cudaError_t cudaGraphClone(cudaGraph_t* clone, cudaGraph_t graph) {
  *clone = new CUgraph_st(*graph);
  return finish();
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return finish();
}
// Their number alone.
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (nodes) return refuse(cudaErrorNotSupported, "cudaGraphGetNodes: nodes are no objects here");
  *count = graph->work.size();
  return finish();
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
  *executable = new CUgraphExec_st{graph->work};
  return finish();
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                          unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}
cudaError_t cudaGraphExecUpdate(cudaGraphExec_t executable, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* result) {
  if (result) *result = {};
  executable->work = graph->work;
  return finish();
}
cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return finish(); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  return submit(stream, [work = executable->work] { return run_all(work); });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete executable;
  return finish();
}

PTXVM_PER_THREAD(cudaStreamIsCapturing, _ptsz);
PTXVM_PER_THREAD(cudaStreamGetCaptureInfo, _ptsz);
PTXVM_PER_THREAD(cudaStreamBeginCapture, _ptsz);
PTXVM_PER_THREAD(cudaStreamEndCapture, _ptsz);
PTXVM_PER_THREAD(cudaGraphLaunch, _ptsz);
