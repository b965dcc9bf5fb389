// Memory, streams and events. Device memory is host memory; streams run in order, at once.
#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "ptxvm/check.h"
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

constexpr size_t kAlignment = 256;  // of cudaMalloc

cudaError_t allocate(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* const memory = std::aligned_alloc(kAlignment, rounded);
  if (!memory)
    return refuse(cudaErrorMemoryAllocation,
                  "cudaMalloc: no memory for " + std::to_string(bytes) + " bytes");
  std::memset(memory, 0xff, rounded);  // NaN, where a kernel reads what nobody wrote
  const std::lock_guard lock(runtime().mutex);
  runtime().allocations[memory] = bytes;
  register_memory(memory, bytes, true);
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  const std::lock_guard lock(runtime().mutex);
  if (!runtime().allocations.erase(pointer))
    return refuse(cudaErrorInvalidValue, "cudaFree: the pointer is not one of cudaMalloc");
  unregister_memory(pointer);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t copy(void* destination, const void* source, size_t bytes) {
  if (bytes) std::memmove(destination, source, bytes);
  return cudaSuccess;
}

cudaError_t copy_rows(void* destination, size_t destination_pitch, const void* source,
                      size_t source_pitch, size_t width, size_t height) {
  if (width > destination_pitch || width > source_pitch)
    return refuse(cudaErrorInvalidPitchValue, "cudaMemcpy2D: a row is longer than the pitch");
  for (size_t row = 0; row < height; ++row)
    copy(static_cast<char*>(destination) + row * destination_pitch,
         static_cast<const char*>(source) + row * source_pitch, width);
  return cudaSuccess;
}

cudaError_t find_variable(const void* symbol, const Variable*& variable) {
  const auto record = runtime().variables.find(symbol);
  if (record == runtime().variables.end())
    return refuse(cudaErrorInvalidSymbol, "no such variable is registered");
  LoadedModule& loaded = *record->second.loaded;
  const std::string& name = record->second.name;
  Module* const module = loaded.open();
  if (!module) return refuse(static_cast<cudaError_t>(loaded.error), name + ": " + loaded.report);
  const auto found = module->variables.find(name);
  if (found == module->variables.end() || !found->second.memory)
    return refuse(cudaErrorInvalidSymbol, name + ": the module has no such variable");
  variable = &found->second;
  return cudaSuccess;
}

cudaError_t find_symbol(const void* symbol, size_t bytes, size_t offset, char*& memory) {
  const std::lock_guard lock(runtime().mutex);
  const Variable* found = nullptr;
  if (const auto error = find_variable(symbol, found)) return error;
  const Variable& variable = *found;
  if (offset > variable.bytes || bytes > variable.bytes - offset)
    return refuse(cudaErrorInvalidValue, variable.name + ": bytes " + std::to_string(offset) +
                                             " to " + std::to_string(offset + bytes) + " of " +
                                             std::to_string(variable.bytes));
  memory = variable.memory + offset;
  return cudaSuccess;
}

cudaError_t copy_to_symbol(const void* symbol, const void* source, size_t bytes, size_t offset) {
  char* memory = nullptr;
  if (const auto error = find_symbol(symbol, bytes, offset, memory)) return error;
  return copy(memory, source, bytes);
}

cudaError_t copy_from_symbol(void* destination, const void* symbol, size_t bytes, size_t offset) {
  char* memory = nullptr;
  if (const auto error = find_symbol(symbol, bytes, offset, memory)) return error;
  return copy(destination, memory, bytes);
}

cudaError_t fill(void* pointer, int value, size_t bytes) {
  if (bytes) std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t record(cudaEvent_t event) {
  event->recorded = std::chrono::steady_clock::now();
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return allocate(pointer, bytes); }
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes);
}
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes);
}
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) {
  return allocate(pointer, bytes);
}
cudaError_t cudaFree(void* pointer) { return release(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return release(pointer); }

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  const std::lock_guard lock(runtime().mutex);
  register_memory(pointer, bytes, true);
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  unregister_memory(pointer);
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(runtime().mutex);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  for (const auto& [base, bytes] : runtime().allocations) {
    const auto* const first = static_cast<const char*>(base);
    if (pointer < first || pointer >= first + bytes) continue;
    attributes->type = cudaMemoryTypeDevice;
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(pointer);
  }
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = size_t{8} << 30;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* destination, const void* source, size_t bytes, cudaMemcpyKind) {
  return copy(destination, source, bytes);
}
cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return copy(destination, source, bytes);
}
cudaError_t cudaMemcpy2D(void* destination, size_t destination_pitch, const void* source,
                         size_t source_pitch, size_t width, size_t height, cudaMemcpyKind) {
  return copy_rows(destination, destination_pitch, source, source_pitch, width, height);
}
cudaError_t cudaMemcpy2DAsync(void* destination, size_t destination_pitch, const void* source,
                              size_t source_pitch, size_t width, size_t height, cudaMemcpyKind,
                              cudaStream_t) {
  return copy_rows(destination, destination_pitch, source, source_pitch, width, height);
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return fill(pointer, value, bytes);
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return fill(pointer, value, bytes);
}
cudaError_t cudaMemset2D(void* pointer, size_t pitch, int value, size_t width, size_t height) {
  for (size_t row = 0; row < height; ++row)
    fill(static_cast<char*>(pointer) + row * pitch, value, width);
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t) {
  return cudaMemset2D(pointer, pitch, value, width, height);
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* source, size_t bytes, size_t offset,
                               cudaMemcpyKind) {
  return copy_to_symbol(symbol, source, bytes, offset);
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* source, size_t bytes,
                                    size_t offset, cudaMemcpyKind, cudaStream_t) {
  return copy_to_symbol(symbol, source, bytes, offset);
}
cudaError_t cudaMemcpyFromSymbol(void* destination, const void* symbol, size_t bytes, size_t offset,
                                 cudaMemcpyKind) {
  return copy_from_symbol(destination, symbol, bytes, offset);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* destination, const void* symbol, size_t bytes,
                                      size_t offset, cudaMemcpyKind, cudaStream_t) {
  return copy_from_symbol(destination, symbol, bytes, offset);
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  char* memory = nullptr;
  const auto error = find_symbol(symbol, 0, 0, memory);
  *pointer = memory;
  return error;
}
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  const std::lock_guard lock(runtime().mutex);
  const Variable* variable = nullptr;
  if (const auto error = find_variable(symbol, variable)) return error;
  *bytes = variable->bytes;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = new CUstream_st{flags, priority};
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamGetDevice(cudaStream_t, int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream ? stream->priority : 0;
  return cudaSuccess;
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream ? stream->flags : 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t*, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t* dependencies) {
  *status = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (dependencies) *dependencies = 0;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st{std::chrono::steady_clock::now()};
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return record(event); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  return record(event);
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  *milliseconds = std::chrono::duration<float, std::milli>(end->recorded - start->recorded).count();
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

// Names that code compiled with a default stream per thread calls. There is one order of work.
#define PTXVM_PER_THREAD(function, suffix) \
  extern "C"                               \
      __attribute__((visibility("default"), alias(#function))) decltype(function) function##suffix

PTXVM_PER_THREAD(cudaMemcpy, _ptds);
PTXVM_PER_THREAD(cudaMemcpy2D, _ptds);
PTXVM_PER_THREAD(cudaMemcpyToSymbol, _ptds);
PTXVM_PER_THREAD(cudaMemcpyFromSymbol, _ptds);
PTXVM_PER_THREAD(cudaMemset, _ptds);
PTXVM_PER_THREAD(cudaMemset2D, _ptds);
PTXVM_PER_THREAD(cudaMemcpyAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemcpy2DAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemcpyToSymbolAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemcpyFromSymbolAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemsetAsync, _ptsz);
PTXVM_PER_THREAD(cudaMemset2DAsync, _ptsz);
PTXVM_PER_THREAD(cudaMallocAsync, _ptsz);
PTXVM_PER_THREAD(cudaFreeAsync, _ptsz);
PTXVM_PER_THREAD(cudaStreamSynchronize, _ptsz);
PTXVM_PER_THREAD(cudaStreamQuery, _ptsz);
PTXVM_PER_THREAD(cudaStreamWaitEvent, _ptsz);
PTXVM_PER_THREAD(cudaStreamIsCapturing, _ptsz);
PTXVM_PER_THREAD(cudaStreamGetCaptureInfo, _ptsz);
PTXVM_PER_THREAD(cudaLaunchHostFunc, _ptsz);
PTXVM_PER_THREAD(cudaEventRecord, _ptsz);
PTXVM_PER_THREAD(cudaEventRecordWithFlags, _ptsz);
