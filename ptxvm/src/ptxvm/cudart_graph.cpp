// Graphs: the work of captured streams in call order, which is one of the orders that the
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
  bool is_new;  // created by the capture, not by the caller
  CUstream_st* origin;
  cudaStreamCaptureMode mode;
  const void* thread;  // thread that began it
  unsigned long long id;
  bool invalid = false;
  struct Member {
    CUstream_st* stream;
    uint64_t work = 0, joined = 0;  // joined: the part that another stream of the capture waits for
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

Capture::Member* member_of(Capture& capture, const CUstream_st* stream) {
  const auto found = std::find_if(capture.members.begin(), capture.members.end(),
                                  [&](const auto& member) { return member.stream == stream; });
  return found == capture.members.end() ? nullptr : &*found;
}

void drop_graph(Capture& capture) {
  if (capture.is_new) delete capture.graph;
  capture.graph = nullptr;
}

void draw_in(const std::shared_ptr<Capture>& capture, CUstream_st* stream) {
  stream->capture = capture;
  if (!member_of(*capture, stream)) capture->members.push_back({stream});
}

// A capture with a stream for which the legacy default stream waits; null if there is none.
Capture* capture_beside_legacy() {
  for (const auto& capture : active())
    for (const auto& member : capture->members)
      if (!(member.stream->flags & cudaStreamNonBlocking)) return capture.get();
  return nullptr;
}

cudaError_t refuse_invalid(const char* function) {
  return refuse(cudaErrorStreamCaptureInvalidated,
                std::string(function) + ": the capture of the stream is invalid");
}

// Result of a call on the legacy default stream: success if it disturbs no capture.
cudaError_t forbid_legacy(const char* function) {
  Capture* const capture = capture_beside_legacy();
  if (!capture) return finish();
  return invalidate(
      *capture, cudaErrorStreamCaptureImplicit,
      std::string(function) + ": the legacy default stream waits for a stream that is captured");
}

cudaError_t run_all(const std::vector<Work>& work) {
  for (const Work& step : work)
    if (const auto error = step()) return error;
  return finish();
}

}  // namespace

cudaError_t submit(cudaStream_t stream, Work work) {
  {
    const std::lock_guard lock(runtime().mutex);
    CUstream_st* const object = object_of(stream);
    if (!object && capture_beside_legacy()) return forbid_legacy("work");
    if (object && object->capture) {
      Capture& capture = *object->capture;
      if (capture.invalid) return refuse_invalid("work");
      ++member_of(capture, object)->work;
      capture.graph->work.push_back(std::move(work));
      return finish();
    }
  }
  return work();
}

bool is_captured(cudaStream_t stream) {
  const std::lock_guard lock(runtime().mutex);
  const CUstream_st* const object = object_of(stream);
  return object && object->capture;
}

cudaError_t forbid_in_capture(const char* function) {
  const std::lock_guard lock(runtime().mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& capture : active()) {
    const bool everywhere =
        thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        (everywhere || capture->thread == &thread_mark))
      return invalidate(*capture, cudaErrorStreamCaptureUnsupported,
                        std::string(function) + ": not while a stream is captured");
  }
  return cudaSuccess;
}

cudaError_t forbid_in_capture(const char* function, cudaStream_t stream) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  if (!object) return forbid_legacy(function);
  if (!object->capture) return finish();
  return invalidate(*object->capture, cudaErrorStreamCaptureUnsupported,
                    std::string(function) + ": the stream is captured");
}

cudaError_t leave_out_of_capture(const char* function, cudaStream_t stream) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  if (!object) return forbid_legacy(function);
  if (!object->capture) return finish();
  return refuse(cudaErrorNotSupported,
                std::string(function) + ": graphs have no nodes for memory here");
}

cudaError_t record_event(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard lock(runtime().mutex);
  CUstream_st* const object = object_of(stream);
  if (!object)
    if (const auto error = forbid_legacy("cudaEventRecord")) return error;
  const auto capture = object ? object->capture : nullptr;
  if (capture && capture->invalid) return refuse_invalid("cudaEventRecord");
  event->is_recorded = true;
  event->capture = capture;
  event->stream = object;
  if (capture)
    event->work = member_of(*capture, object)->work;
  else
    event->recorded = std::chrono::steady_clock::now();
  return finish();
}

cudaError_t wait_for_event(cudaStream_t stream, cudaEvent_t event) {
  const std::lock_guard lock(runtime().mutex);
  constexpr const char* kName = "cudaStreamWaitEvent";
  CUstream_st* const object = object_of(stream);
  const auto own = object ? object->capture : nullptr;
  // The capture of an event ends with its graph.
  const auto capture = event->capture && event->capture->graph ? event->capture : nullptr;
  if ((own && own->invalid) || (capture && capture->invalid)) return refuse_invalid(kName);
  if (!capture) {
    if (own && event->is_recorded)
      return invalidate(*own, cudaErrorStreamCaptureIsolation,
                        std::string(kName) + ": the event was recorded outside of the capture");
    return finish();
  }
  if (!object)
    return invalidate(*capture, cudaErrorStreamCaptureIsolation,
                      std::string(kName) + ": the default stream cannot join a capture");
  if (own && own != capture) {
    own->invalid = true;
    return invalidate(*capture, cudaErrorStreamCaptureMerge,
                      std::string(kName) + ": the event belongs to another capture");
  }
  draw_in(capture, object);
  if (event->stream != object)
    if (auto* const other = member_of(*capture, event->stream))
      other->joined = std::max(other->joined, event->work);
  ++member_of(*capture, object)->work;
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
                  "cudaStreamBeginCapture: the legacy default stream cannot be captured");
  if (object->capture)
    return refuse(cudaErrorIllegalState, "cudaStreamBeginCapture: the stream is captured already");
  const auto capture = std::make_shared<Capture>();
  capture->graph = graph ? graph : new CUgraph_st;
  capture->is_new = !graph;
  capture->origin = object;
  capture->mode = mode;
  capture->thread = &thread_mark;
  capture->id = ++captures_begun;
  draw_in(capture, object);
  active().push_back(capture);
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const std::lock_guard lock(runtime().mutex);
  const CUstream_st* const object = object_of(stream);
  if (!object && capture_beside_legacy())
    return refuse(cudaErrorStreamCaptureImplicit,
                  "cudaStreamIsCapturing: a stream is captured that the default stream waits for");
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
  *status = cudaStreamCaptureStatusNone;
  const auto error = cudaStreamIsCapturing(stream, status);
  const bool captures = *status == cudaStreamCaptureStatusActive;
  if (id) *id = captures ? object_of(stream)->capture->id : 0;
  if (graph) *graph = captures ? object_of(stream)->capture->graph : nullptr;
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
  if (capture->origin != object)
    return invalidate(*capture, cudaErrorStreamCaptureUnmatched,
                      "cudaStreamEndCapture: the capture began in another stream");
  if (capture->thread != &thread_mark && capture->mode != cudaStreamCaptureModeRelaxed)
    return refuse(cudaErrorStreamCaptureWrongThread,
                  "cudaStreamEndCapture: the capture began in another thread");
  const bool unjoined = std::any_of(
      capture->members.begin(), capture->members.end(),
      [&](const auto& member) { return member.stream != object && member.joined != member.work; });
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
// Returns only the number of nodes.
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
  if (executable->work.size() != graph->work.size()) {
    if (result) result->result = cudaGraphExecUpdateErrorTopologyChanged;
    return refuse(cudaErrorGraphExecUpdateFailure,
                  "cudaGraphExecUpdate: the graph has another number of nodes");
  }
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
PTXVM_PER_THREAD(cudaGraphUpload, _ptsz);
PTXVM_PER_THREAD(cudaStreamBeginCaptureToGraph, _ptsz);
PTXVM_PER_THREAD(cudaStreamUpdateCaptureDependencies, _ptsz);
