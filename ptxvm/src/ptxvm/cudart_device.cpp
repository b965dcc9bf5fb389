// The device, its attributes, and errors.
#include <algorithm>
#include <cstdio>
#include <unordered_set>

#include "ptxvm/device.h"
#include "ptxvm/heap.h"
#include "ptxvm/streams.h"

using namespace ptxvm;

namespace {

struct ErrorName {
  cudaError_t error;
  const char *name, *text;
};

// Errors that the machine returns, with the texts of the CUDA runtime.
constexpr ErrorName kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInvalidPitchValue, "cudaErrorInvalidPitchValue", "invalid pitch argument"},
    {cudaErrorInvalidMemcpyDirection, "cudaErrorInvalidMemcpyDirection",
     "invalid copy direction for memcpy"},
    {cudaErrorInvalidSymbol, "cudaErrorInvalidSymbol", "invalid device symbol"},
    {cudaErrorMissingConfiguration, "cudaErrorMissingConfiguration",
     "__global__ function call is not configured"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidKernelImage, "cudaErrorInvalidKernelImage", "device kernel image is invalid"},
    {cudaErrorInvalidPtx, "cudaErrorInvalidPtx", "a PTX JIT compilation failed"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources",
     "too many resources requested for launch"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorCooperativeLaunchTooLarge, "cudaErrorCooperativeLaunchTooLarge",
     "too many blocks in cooperative launch"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorIllegalState, "cudaErrorIllegalState",
     "the operation cannot be performed in the present state"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureMerge, "cudaErrorStreamCaptureMerge",
     "operation would result in a merge of separate capture sequences"},
    {cudaErrorStreamCaptureUnmatched, "cudaErrorStreamCaptureUnmatched",
     "capture was not ended in the same stream as it began"},
    {cudaErrorStreamCaptureUnjoined, "cudaErrorStreamCaptureUnjoined",
     "capturing stream has unjoined work"},
    {cudaErrorStreamCaptureIsolation, "cudaErrorStreamCaptureIsolation",
     "dependency created on uncaptured work in another stream"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorCapturedEvent, "cudaErrorCapturedEvent",
     "operation not permitted on an event last recorded in a capturing stream"},
    {cudaErrorStreamCaptureWrongThread, "cudaErrorStreamCaptureWrongThread",
     "attempt to terminate a thread-local capture sequence from another thread"},
    {cudaErrorGraphExecUpdateFailure, "cudaErrorGraphExecUpdateFailure",
     "the graph update was not performed because it included changes which violated constraints "
     "specific to instantiated graph update"},
    {cudaErrorUnsupportedLimit, "cudaErrorUnsupportedLimit",
     "limit is not supported on this architecture"},
};

const ErrorName* find_error(cudaError_t error) {
  for (const ErrorName& entry : kErrors)
    if (entry.error == error) return &entry;
  return nullptr;
}

}  // namespace

cudaError_t cudaGetLastError() { return static_cast<cudaError_t>(last_error(true)); }
cudaError_t cudaPeekAtLastError() { return static_cast<cudaError_t>(last_error(false)); }

const char* cudaGetErrorName(cudaError_t error) {
  const ErrorName* const entry = find_error(error);
  return entry ? entry->name : "unrecognized error code";
}

// Includes the machine's report if this is the error of the last failure, so that a host program
// that prints it says what went wrong. A text stays valid until the process ends.
const char* cudaGetErrorString(cudaError_t error) {
  const ErrorName* const entry = find_error(error);
  const char* const text = entry ? entry->text : "unrecognized error code";
  const std::string report = error == cudaSuccess ? std::string() : report_of_error(error);
  if (report.empty()) return text;
  static auto* const texts = new std::unordered_set<std::string>;
  const std::lock_guard lock(runtime().mutex);
  return texts->insert(text + (": " + report)).first->c_str();
}

cudaError_t cudaGetDevice(int* device) {
  const std::lock_guard lock(runtime().mutex);
  *device = device_ordinal();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  const std::lock_guard lock(runtime().mutex);
  if (!choose_device(device))
    return refuse(cudaErrorInvalidDevice, "cudaSetDevice: must be from 0 to " +
                                              std::to_string(device_count() - 1) + "; got " +
                                              std::to_string(device));
  return finish();
}
cudaError_t cudaInitDevice(int device, unsigned, unsigned) { return cudaSetDevice(device); }
cudaError_t cudaGetDeviceCount(int* count) {
  const std::lock_guard lock(runtime().mutex);
  *count = device_count();
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  const auto error = forbid_in_capture("cudaDeviceSynchronize");
  return error ? error : finish();
}
cudaError_t cudaDeviceReset() { return finish(); }
cudaError_t cudaSetDeviceFlags(unsigned) { return finish(); }
cudaError_t cudaGetDeviceFlags(unsigned* flags) {
  *flags = 0;
  return finish();
}
cudaError_t cudaDeviceSetCacheConfig(cudaFuncCache) { return finish(); }
PTXVM_EXPORT cudaError_t cudaProfilerStart() { return finish(); }
PTXVM_EXPORT cudaError_t cudaProfilerStop() { return finish(); }

namespace {

// Limits that are stored but have no effect, except for that of the heap. Bytes, except for the
// depth.
size_t limits[] = {
    1024,     // cudaLimitStackSize
    1 << 20,  // cudaLimitPrintfFifoSize
    0,        // cudaLimitMallocHeapSize: heap_limit
    2,        // cudaLimitDevRuntimeSyncDepth
    2048,     // cudaLimitDevRuntimePendingLaunchCount
    64,       // cudaLimitMaxL2FetchGranularity
    0,        // cudaLimitPersistingL2CacheSize
};

size_t* find_limit(cudaLimit limit) {
  if (limit == cudaLimitMallocHeapSize) return &heap_limit;
  return static_cast<size_t>(limit) < std::size(limits) ? &limits[limit] : nullptr;
}

}  // namespace

cudaError_t cudaDeviceSetLimit(cudaLimit limit, size_t value) {
  size_t* const known = find_limit(limit);
  if (!known) return refuse(cudaErrorUnsupportedLimit, "cudaDeviceSetLimit: unknown limit");
  *known = value;
  return finish();
}
cudaError_t cudaDeviceGetLimit(size_t* value, cudaLimit limit) {
  const size_t* const known = find_limit(limit);
  if (!known) return refuse(cudaErrorUnsupportedLimit, "cudaDeviceGetLimit: unknown limit");
  *value = *known;
  return finish();
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int ordinal) {
  const std::lock_guard lock(runtime().mutex);
  const Device* const found = device_of(ordinal);
  if (!found)
    return refuse(cudaErrorInvalidDevice,
                  "cudaGetDeviceProperties: no device " + std::to_string(ordinal));
  const Device& device = *found;
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "PTX machine, %s", device.name);
  properties->totalGlobalMem = size_t{8} << 30;
  properties->sharedMemPerBlock = kSharedPerBlock;
  properties->sharedMemPerBlockOptin = device.shared_per_block();
  properties->sharedMemPerMultiprocessor = device.shared_per_multiprocessor;
  properties->reservedSharedMemPerBlock = kSharedReserved;
  properties->regsPerBlock = properties->regsPerMultiprocessor = kRegistersPerMultiprocessor;
  properties->warpSize = kLanes;
  properties->maxThreadsPerBlock = kMaxThreadsPerBlock;
  for (int i = 0; i < 3; ++i) {
    properties->maxThreadsDim[i] = static_cast<int>(kMaxBlockExtent[i]);
    properties->maxGridSize[i] = static_cast<int>(kMaxGridExtent[i]);
  }
  properties->totalConstMem = 65536;
  properties->major = device.major;
  properties->minor = device.minor;
  properties->multiProcessorCount = static_cast<int>(multiprocessors(device));
  properties->maxThreadsPerMultiProcessor = static_cast<int>(device.threads_per_multiprocessor);
  properties->maxBlocksPerMultiProcessor = static_cast<int>(device.blocks_per_multiprocessor);
  properties->concurrentKernels = properties->unifiedAddressing = properties->managedMemory = 1;
  properties->cooperativeLaunch = 1;
  properties->clusterLaunch = device.has_clusters();
  properties->l2CacheSize = static_cast<int>(device.level2);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  if (const auto error = cudaGetDeviceProperties(&properties, device)) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = properties.maxThreadsPerBlock;
      break;
    case cudaDevAttrMaxBlockDimX:
      *value = properties.maxThreadsDim[0];
      break;
    case cudaDevAttrMaxBlockDimY:
      *value = properties.maxThreadsDim[1];
      break;
    case cudaDevAttrMaxBlockDimZ:
      *value = properties.maxThreadsDim[2];
      break;
    case cudaDevAttrMaxGridDimX:
      *value = properties.maxGridSize[0];
      break;
    case cudaDevAttrMaxGridDimY:
      *value = properties.maxGridSize[1];
      break;
    case cudaDevAttrMaxGridDimZ:
      *value = properties.maxGridSize[2];
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(properties.sharedMemPerBlock);
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(properties.sharedMemPerBlockOptin);
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(properties.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = static_cast<int>(properties.reservedSharedMemPerBlock);
      break;
    case cudaDevAttrTotalConstantMemory:
      *value = static_cast<int>(properties.totalConstMem);
      break;
    case cudaDevAttrWarpSize:
      *value = properties.warpSize;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = properties.regsPerBlock;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = properties.regsPerMultiprocessor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = properties.multiProcessorCount;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = properties.maxThreadsPerMultiProcessor;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = properties.maxBlocksPerMultiProcessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = properties.major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = properties.minor;
      break;
    case cudaDevAttrL2CacheSize:
      *value = properties.l2CacheSize;
      break;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
      *value = 1;
      break;
    case cudaDevAttrClusterLaunch:
      *value = properties.clusterLaunch;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}
