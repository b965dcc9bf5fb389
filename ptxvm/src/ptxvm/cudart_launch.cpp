// Registration of modules by compiled host code, and launches.
#include <algorithm>

#include "ptxvm/device.h"
#include "ptxvm/streams.h"

using namespace ptxvm;

namespace {

struct CallConfiguration {
  dim3 grid, block;
  size_t dynamic_shared;
  void* stream;
};

std::vector<CallConfiguration>& pending_calls() {
  thread_local std::vector<CallConfiguration> calls;
  return calls;
}

// Host code loaded before the machine unregisters its modules after the machine's own variables are
// destroyed.
bool process_ends = false;
struct AtEnd {
  ~AtEnd() { process_ends = true; }
} at_end;

struct Call {
  dim3 grid, block;
  size_t dynamic_shared = 0;
  cudaStream_t stream = nullptr;
  dim3 cluster = {0, 0, 0};  // 0: the kernel's own
  bool cooperative = false;
};

struct Shape {
  uint32_t grid[3], block[3], cluster[3];
  explicit Shape(const Call& call)
      : grid{call.grid.x, call.grid.y, call.grid.z},
        block{call.block.x, call.block.y, call.block.z},
        cluster{call.cluster.x, call.cluster.y, call.cluster.z} {}
  const uint32_t* given_cluster() const { return cluster[0] ? cluster : nullptr; }
};

cudaError_t run(KernelRecord* record, const Call& call, void** arguments) {
  const Shape shape(call);
  return static_cast<cudaError_t>(launch_on_device(record, shape.grid, shape.block,
                                                   call.dynamic_shared, arguments,
                                                   shape.given_cluster(), call.cooperative));
}

// Launches at once, or records the launch with a copy of its arguments for a graph.
cudaError_t launch_record(KernelRecord* record, const Call& call, void** arguments) {
  if (!is_captured(call.stream))
    return submit(call.stream, [&] { return run(record, call, arguments); });
  std::vector<std::vector<char>> values;
  {
    const std::lock_guard lock(runtime().mutex);
    const Shape shape(call);
    if (const int error = check_launch(record, shape.grid, shape.block, call.dynamic_shared,
                                       shape.given_cluster(), call.cooperative))
      return static_cast<cudaError_t>(error);
    for (const Parameter& parameter : record->kernel->parameters) {
      const auto* const value = static_cast<const char*>(arguments[values.size()]);
      values.emplace_back(value, value + parameter.bytes);
    }
  }
  return submit(call.stream, [record, call, values]() mutable {
    std::vector<void*> pointers;
    for (auto& value : values) pointers.push_back(value.data());
    return run(record, call, pointers.data());
  });
}

KernelRecord* find(const void* function) {
  const std::lock_guard lock(runtime().mutex);
  return runtime().find(function);
}

cudaError_t launch_function(const void* function, const Call& call, void** arguments) {
  return launch_record(find(function), call, arguments);
}

}  // namespace

PTXVM_EXPORT void** __cudaRegisterFatBinary(void* wrapper) {
  const std::lock_guard lock(runtime().mutex);
  runtime().modules.push_back(std::make_unique<LoadedModule>());
  LoadedModule* const loaded = runtime().modules.back().get();
  loaded->fat_binary = wrapper;
  return reinterpret_cast<void**>(loaded);
}

PTXVM_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

PTXVM_EXPORT void __cudaUnregisterFatBinary(void** handle) {
  if (process_ends) return;
  const std::lock_guard lock(runtime().mutex);
  unload(reinterpret_cast<LoadedModule*>(handle));
}

PTXVM_EXPORT char __cudaInitModule(void**) { return 1; }

PTXVM_EXPORT void __cudaRegisterFunction(void** handle, const char* host_function, char*,
                                         const char* name, int, uint3*, uint3*, dim3*, dim3*,
                                         int*) {
  const std::lock_guard lock(runtime().mutex);
  auto* const loaded = reinterpret_cast<LoadedModule*>(handle);
  runtime().kernels[host_function] = std::make_unique<KernelRecord>(KernelRecord{loaded, name});
}

PTXVM_EXPORT void __cudaRegisterVar(void** handle, char* shadow, char*, const char* name, int,
                                    size_t, int, int) {
  const std::lock_guard lock(runtime().mutex);
  runtime().variables[shadow] = {reinterpret_cast<LoadedModule*>(handle), name};
}

PTXVM_EXPORT void __cudaRegisterManagedVar(void** handle, void** pointer, char*, const char* name,
                                           int, size_t, int, int) {
  const std::lock_guard lock(runtime().mutex);
  auto* const loaded = reinterpret_cast<LoadedModule*>(handle);
  const Module* const module = loaded->open().module.get();
  if (!module) return;
  const auto found = module->variables.find(name);
  if (found != module->variables.end()) *pointer = found->second.memory;
}

PTXVM_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t dynamic_shared,
                                                  void* stream) {
  pending_calls().push_back({grid, block, dynamic_shared, stream});
  return 0;
}

PTXVM_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* dynamic_shared,
                                                    void* stream) {
  if (pending_calls().empty())
    return refuse(cudaErrorMissingConfiguration, "a launch without a configuration");
  const CallConfiguration call = pending_calls().back();
  pending_calls().pop_back();
  *grid = call.grid;
  *block = call.block;
  *dynamic_shared = call.dynamic_shared;
  *static_cast<void**>(stream) = call.stream;
  return cudaSuccess;
}

PTXVM_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  const std::lock_guard lock(runtime().mutex);
  KernelRecord* const record = runtime().find(function);
  if (!record) return refuse(cudaErrorInvalidDeviceFunction, "no such kernel is registered");
  *kernel = reinterpret_cast<cudaKernel_t>(record);
  return cudaSuccess;
}

PTXVM_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block,
                                            void** arguments, size_t dynamic_shared,
                                            cudaStream_t stream) {
  return launch_record(reinterpret_cast<KernelRecord*>(kernel),
                       {grid, block, dynamic_shared, stream}, arguments);
}

PTXVM_EXPORT cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3 grid, dim3 block,
                                                 void** arguments, size_t dynamic_shared,
                                                 cudaStream_t stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, dynamic_shared, stream);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments,
                             size_t dynamic_shared, cudaStream_t stream) {
  return launch_function(function, {grid, block, dynamic_shared, stream}, arguments);
}

PTXVM_EXPORT cudaError_t cudaLaunchKernel_ptsz(const void* function, dim3 grid, dim3 block,
                                               void** arguments, size_t dynamic_shared,
                                               cudaStream_t stream) {
  return cudaLaunchKernel(function, grid, block, arguments, dynamic_shared, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block,
                                        void** arguments, size_t dynamic_shared,
                                        cudaStream_t stream) {
  Call call{grid, block, dynamic_shared, stream};
  call.cooperative = true;
  return launch_function(function, call, arguments);
}

PTXVM_EXPORT cudaError_t cudaLaunchCooperativeKernel_ptsz(const void* function, dim3 grid,
                                                          dim3 block, void** arguments,
                                                          size_t dynamic_shared,
                                                          cudaStream_t stream) {
  return cudaLaunchCooperativeKernel(function, grid, block, arguments, dynamic_shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  Call call{config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      call.cluster = {cluster.x, cluster.y, cluster.z};
    }
    if (attribute.id == cudaLaunchAttributeCooperative && attribute.val.cooperative)
      call.cooperative = true;
  }
  return launch_function(function, call, arguments);
}

PTXVM_EXPORT cudaError_t cudaLaunchKernelExC_ptsz(const cudaLaunchConfig_t* config,
                                                  const void* function, void** arguments) {
  return cudaLaunchKernelExC(config, function, arguments);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const std::lock_guard lock(runtime().mutex);
  if (const auto error = finish()) return error;
  KernelRecord* const record = runtime().find(function);
  if (const int error = prepare(record)) return static_cast<cudaError_t>(error);
  Kernel& kernel = *record->kernel;
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) kernel.any_cluster = value != 0;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  const int limit =
      static_cast<int>(device().shared_per_block()) - static_cast<int>(kernel.static_shared);
  if (value < 0 || value > limit)
    return refuse(cudaErrorInvalidValue,
                  demangled(record->name) +
                      ": cudaFuncSetAttribute: dynamic shared memory is at most " +
                      std::to_string(limit) + " bytes on " + device().name + "; got " +
                      std::to_string(value));
  kernel.max_dynamic_shared[device_position()] = static_cast<uint32_t>(value);
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  const std::lock_guard lock(runtime().mutex);
  if (const auto error = finish()) return error;
  KernelRecord* const record = runtime().find(function);
  if (const int error = prepare(record)) return static_cast<cudaError_t>(error);
  const Kernel& kernel = *record->kernel;
  *attributes = {};
  attributes->sharedSizeBytes = kernel.static_shared;
  attributes->localSizeBytes = kernel.local_bytes;
  attributes->maxThreadsPerBlock =
      static_cast<int>(kernel.max_threads ? kernel.max_threads : kMaxThreadsPerBlock);
  attributes->numRegs = static_cast<int>(kernel.registers);
  attributes->ptxVersion = static_cast<int>(device().newest_ptx);
  attributes->binaryVersion = device().major * 10 + device().minor;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(dynamic_shared_limit(kernel));
  return cudaSuccess;
}

cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return finish(); }

cudaError_t cudaFuncGetName(const char** name, const void* function) {
  const std::lock_guard lock(runtime().mutex);
  KernelRecord* const record = runtime().find(function);
  if (!record) return refuse(cudaErrorInvalidDeviceFunction, "no such kernel is registered");
  *name = record->name.c_str();
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* function, int threads, size_t dynamic_shared, unsigned) {
  const std::lock_guard lock(runtime().mutex);
  if (const auto error = finish()) return error;
  KernelRecord* const record = runtime().find(function);
  if (const int error = prepare(record)) return static_cast<cudaError_t>(error);
  const bool fits = dynamic_shared <= dynamic_shared_limit(*record->kernel) && threads > 0;
  *blocks = fits ? static_cast<int>(
                       blocks_per_multiprocessor(*record->kernel, static_cast<uint32_t>(threads),
                                                 static_cast<uint32_t>(dynamic_shared)))
                 : 0;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                          int threads, size_t dynamic_shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads,
                                                                dynamic_shared, 0);
}

// Clusters that the SMs hold at a time, assuming that all SMs belong to one GPC.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* function,
                                           const cudaLaunchConfig_t* config) {
  uint64_t blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = config->attrs[i].val.clusterDim;
      blocks = std::max(uint64_t{cluster.x} * cluster.y * cluster.z, uint64_t{1});
    }
  int each = 0;
  const dim3& shape = config->blockDim;
  if (const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
          &each, function, static_cast<int>(shape.x * shape.y * shape.z), config->dynamicSmemBytes))
    return error;
  const bool fits = device().has_clusters() && blocks <= kMaxCluster;
  *clusters =
      fits ? static_cast<int>(uint64_t{multiprocessors()} * static_cast<uint64_t>(each) / blocks)
           : 0;
  return cudaSuccess;
}
