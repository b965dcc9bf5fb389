// Launches: validity rules, parameters, and errors that persist after a failure.
#include <driver_types.h>
#include <xmmintrin.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "ptxvm/check.h"
#include "ptxvm/clocks.h"
#include "ptxvm/counters.h"
#include "ptxvm/decode.h"
#include "ptxvm/device.h"
#include "ptxvm/fatbin.h"
#include "ptxvm/heap.h"
#include "ptxvm/log.h"
#include "ptxvm/reports.h"
#include "ptxvm/runtime.h"
#include "ptxvm/sched.h"

namespace ptxvm {
namespace {

thread_local int thread_error = cudaSuccess, reported_error = cudaSuccess;
thread_local std::string thread_report, thread_finding = "null";

// Error of the kernel that failed last, until the machine recovers.
int device_fault = cudaSuccess;
std::string device_report;

// Host threads may flush denormals; kernels decide that per instruction.
class DefaultRounding {
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// Barrier workspace of a cooperative grid: its size, a counter. %envreg1 and 2 hold its address.
struct Workspace {
  uint32_t bytes = sizeof(Workspace), barrier = 0;
  Workspace() { register_memory(this, sizeof *this, true); }
  ~Workspace() { unregister_memory(this); }
};

std::string extent(const uint32_t size[3]) {
  return "(" + std::to_string(size[0]) + ", " + std::to_string(size[1]) + ", " +
         std::to_string(size[2]) + ")";
}

// A rule of the device or the kernel that the launch violates, and the resulting CUDA error.
struct Refusal {
  int error = cudaSuccess;
  std::string rule;
};

Refusal check_shape(const Kernel& kernel, const uint32_t grid[3], const uint32_t block[3],
                    size_t dynamic_shared) {
  for (int i = 0; i < 3; ++i) {
    if (grid[i] == 0 || grid[i] > kMaxGridExtent[i])
      return {cudaErrorInvalidConfiguration,
              "grid " + extent(grid) + " must be from 1 to (2147483647, 65535, 65535)"};
    if (block[i] == 0 || block[i] > kMaxBlockExtent[i])
      return {cudaErrorInvalidConfiguration,
              "block " + extent(block) + " must be from 1 to (1024, 1024, 64)"};
  }
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  if (threads > kMaxThreadsPerBlock)
    return {cudaErrorInvalidConfiguration, "a block has at most 1024 threads; got " +
                                               std::to_string(threads) + " in " + extent(block)};
  const auto& required = kernel.required;
  if (required[0] && !std::equal(block, block + 3, required))
    return {cudaErrorInvalidValue,
            "the kernel requires blocks of " + extent(required) + "; got " + extent(block)};
  if (kernel.max_threads && threads > kernel.max_threads)
    return {cudaErrorInvalidValue, "the kernel is bound to " + std::to_string(kernel.max_threads) +
                                       " threads per block; got " + std::to_string(threads)};
  const uint32_t limit = dynamic_shared_limit(kernel);
  if (dynamic_shared > limit)
    return {cudaErrorInvalidValue,
            "dynamic shared memory is at most " + std::to_string(limit) + " bytes" +
                (kernel.max_dynamic_shared.contains(device_position())
                     ? ""
                     : " without cudaFuncAttributeMaxDynamicSharedMemorySize") +
                "; got " + std::to_string(dynamic_shared)};
  if (blocks_per_multiprocessor(kernel, static_cast<uint32_t>(threads),
                                static_cast<uint32_t>(dynamic_shared)) == 0)
    return {cudaErrorLaunchOutOfResources,
            std::to_string(threads) + " threads with " + std::to_string(kernel.registers) +
                " registers and " +
                std::to_string(kernel.dynamic_offset + dynamic_shared + kSharedReserved) +
                " bytes of shared memory do not fit into a multiprocessor"};
  return {};
}

Refusal check_cluster(const Kernel& kernel, const uint32_t grid[3], const uint32_t cluster[3]) {
  const bool small = std::all_of(cluster, cluster + 3, [](uint32_t n) { return n <= kMaxCluster; });
  const uint32_t blocks = small ? cluster[0] * cluster[1] * cluster[2] : UINT32_MAX;
  if (blocks == 1 && !kernel.cluster[0]) return {};
  if (blocks != 1 && !device().has_clusters())
    return {cudaErrorNotSupported,
            "clusters of more than one block need compute capability 9.0; this is " +
                std::string(device().name)};
  if (kernel.cluster[0] && !std::equal(cluster, cluster + 3, kernel.cluster))
    return {cudaErrorInvalidClusterSize, "the kernel requires clusters of " +
                                             extent(kernel.cluster) + "; got " + extent(cluster)};
  const uint32_t limit = kernel.any_cluster ? kMaxCluster : kMaxPortableCluster;
  if (blocks == 0 || blocks > limit)
    return {
        cudaErrorInvalidClusterSize,
        "a cluster has from 1 to " + std::to_string(limit) + " blocks" +
            (kernel.any_cluster ? "" : " without cudaFuncAttributeNonPortableClusterSizeAllowed") +
            "; got " + extent(cluster)};
  for (int i = 0; i < 3; ++i)
    if (grid[i] % cluster[i])
      return {cudaErrorInvalidClusterSize,
              "grid " + extent(grid) + " must be a multiple of the cluster " + extent(cluster)};
  return {};
}

// Blocks of a cooperative grid run together.
Refusal check_cooperative(const Kernel& kernel, const uint32_t grid[3], const uint32_t block[3],
                          size_t dynamic_shared) {
  const uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  const uint64_t capacity = uint64_t{multiprocessors()} *
                            blocks_per_multiprocessor(kernel, block[0] * block[1] * block[2],
                                                      static_cast<uint32_t>(dynamic_shared));
  if (blocks <= capacity) return {};
  return {cudaErrorCooperativeLaunchTooLarge, "a cooperative grid has at most " +
                                                  std::to_string(capacity) + " blocks here; got " +
                                                  std::to_string(blocks)};
}

constexpr uint32_t kAlone[3] = {1, 1, 1};

// Cluster shape of the launch, else of the kernel.
const uint32_t* cluster_of(const Kernel& kernel, const uint32_t* cluster) {
  return cluster ? cluster : kernel.cluster[0] ? kernel.cluster : kAlone;
}

// Logs a launch that has finished.
void log_launch(const Launch& run) {
  if (!has_log()) return;
  const auto list = [](const uint32_t size[3]) {
    return "[" + std::to_string(size[0]) + ", " + std::to_string(size[1]) + ", " +
           std::to_string(size[2]) + "]";
  };
  log_event("{\"launch\": " +
            (options.count ? last_launch()
                           : "{\"kernel\": " + quoted(run.kernel->name) + ", \"grid\": " +
                                 list(run.grid) + ", \"block\": " + list(run.block) + "}") +
            "}");
}

}  // namespace

Runtime& runtime() {
  static Runtime* const instance = new Runtime;
  return *instance;
}

KernelRecord* Runtime::find(const void* function) {
  const auto found = kernels.find(function);
  if (found != kernels.end()) return found->second.get();
  for (const auto& [host, record] : kernels)
    if (record.get() == function) return record.get();
  return nullptr;
}

Image& LoadedModule::open() {
  const auto [entry, is_new] = images.try_emplace(fat_binary ? place_of_ptx(fat_binary) : nullptr);
  Image& image = entry->second;
  // Without an image the report depends on the device, so it is made anew.
  if (!fat_binary || (!is_new && entry->first)) return image;
  FatBinary binary = read_fat_binary(fat_binary);
  image.registers = std::move(binary.registers);
  image.report = binary.error;
  image.error = image.report.empty() ? cudaSuccess : cudaErrorInvalidKernelImage;
  if (!image.error) try {
      image.module = load_module(binary.ptx);
    } catch (const Fault& fault) {
      image.error = cudaErrorInvalidPtx;
      image.report = fault.what();
    }
  return image;
}

LoadedModule* load(const std::string& ptx) {
  auto loaded = std::make_unique<LoadedModule>();
  loaded->images[nullptr].module = load_module(ptx);
  runtime().modules.push_back(std::move(loaded));
  return runtime().modules.back().get();
}

void unload(LoadedModule* loaded) {
  Runtime& state = runtime();
  std::erase_if(state.kernels, [&](const auto& entry) { return entry.second->loaded == loaded; });
  std::erase_if(state.variables, [&](const auto& entry) { return entry.second.loaded == loaded; });
  std::erase_if(state.modules, [&](const auto& owned) { return owned.get() == loaded; });
}

int fail(int error, const std::string& report, const Finding* finding) {
  thread_report = report;
  thread_finding = finding ? finding->json() : "null";
  thread_error = reported_error = error;
  if (has_log())
    log_event("{\"error\": " + std::to_string(error) + ", \"report\": " + quoted(report) +
              ", \"finding\": " + thread_finding + "}");
  return error;
}

std::string& last_report() { return thread_report; }
std::string& last_finding() { return thread_finding; }

std::string report_of_error(int error) {
  const std::lock_guard lock(runtime().mutex);
  if (device_fault && device_fault == error) return device_report;
  return reported_error == error ? thread_report : std::string();
}

int device_error() {
  const std::lock_guard lock(runtime().mutex);
  return device_fault;
}

void recover() {
  const std::lock_guard lock(runtime().mutex);
  device_fault = thread_error = cudaSuccess;
}

int last_error(bool clear) {
  if (const int error = device_error()) return error;
  const int error = thread_error;
  if (clear) thread_error = cudaSuccess;
  return error;
}

uint32_t dynamic_shared_limit(const Kernel& kernel) {
  const auto asked = kernel.max_dynamic_shared.find(device_position());
  if (asked != kernel.max_dynamic_shared.end()) return asked->second;
  return kernel.static_shared < kSharedPerBlock ? kSharedPerBlock - kernel.static_shared : 0;
}

int prepare(KernelRecord* record) {
  if (!record) return fail(cudaErrorInvalidDeviceFunction, "no such kernel is registered");
  Image& image = record->loaded->open();
  Module* const module = image.module.get();
  if (!module) return fail(image.error, demangled(record->name) + ": " + image.report);
  if (!record->kernel || record->kernel->module != module) {
    const auto found = module->kernels.find(record->name);
    if (found == module->kernels.end())
      return fail(cudaErrorInvalidKernelImage,
                  demangled(record->name) + ": the module has no such kernel");
    record->kernel = found->second.get();
    const auto registers = image.registers.find(record->name);
    if (registers != image.registers.end()) record->kernel->registers = registers->second;
  }
  try {
    decode(*record->kernel);
  } catch (const Fault& fault) {
    return fail(cudaErrorInvalidPtx, fault.what());
  }
  return cudaSuccess;
}

int check_launch(KernelRecord* record, const uint32_t grid[3], const uint32_t block[3],
                 size_t dynamic_shared, const uint32_t* cluster, bool cooperative) {
  const std::lock_guard lock(runtime().mutex);
  if (const int error = prepare(record)) return error;
  const Kernel& kernel = *record->kernel;
  Refusal refusal = check_shape(kernel, grid, block, dynamic_shared);
  if (!refusal.error) refusal = check_cluster(kernel, grid, cluster_of(kernel, cluster));
  if (!refusal.error && cooperative)
    refusal = check_cooperative(kernel, grid, block, dynamic_shared);
  return refusal.error ? fail(refusal.error, kernel.title + ": launch: " + refusal.rule) : 0;
}

int launch_on_device(KernelRecord* record, const uint32_t grid[3], const uint32_t block[3],
                     size_t dynamic_shared, void** arguments, const uint32_t* cluster,
                     bool cooperative) {
  const std::lock_guard lock(runtime().mutex);
  if (device_fault) return device_fault;
  const int error = launch(record, grid, block, dynamic_shared, arguments, cluster, cooperative);
  if (error == cudaErrorLaunchFailure || error == cudaErrorAssert) {
    device_fault = error;
    device_report = thread_report;
  }
  return error;
}

int launch(KernelRecord* record, const uint32_t grid[3], const uint32_t block[3],
           size_t dynamic_shared, void** arguments, const uint32_t* cluster, bool cooperative) {
  const std::lock_guard lock(runtime().mutex);
  if (const int error = check_launch(record, grid, block, dynamic_shared, cluster, cooperative))
    return error;
  Kernel& kernel = *record->kernel;
  std::vector<char> parameters(kernel.parameter_bytes + 16);
  for (size_t i = 0; i < kernel.parameters.size(); ++i)
    std::memcpy(parameters.data() + kernel.parameters[i].offset, arguments[i],
                kernel.parameters[i].bytes);
  Launch run{};
  run.kernel = &kernel;
  std::copy_n(grid, 3, run.grid);
  std::copy_n(block, 3, run.block);
  std::copy_n(cluster_of(kernel, cluster), 3, run.cluster);
  run.dynamic_shared = static_cast<uint32_t>(dynamic_shared);
  run.parameters = parameters.data();
  std::optional<Workspace> workspace;
  if (cooperative) run.workspace = &workspace.emplace();
  const DefaultRounding rounding;
  heap_launched();
  try {
    if (options.check) clocks_launched(run.grid, run.cluster);
    if (options.count) start_counting(kernel);
    run_grid(run);
    if (options.count) finish_counting(kernel, run.grid, run.block, run.dynamic_shared, true);
    log_launch(run);
  } catch (const KernelFault& fault) {
    if (options.count) finish_counting(kernel, run.grid, run.block, run.dynamic_shared, false);
    if (options.count) log_launch(run);
    return fail(fault.finding.rule == "assertion" ? cudaErrorAssert : cudaErrorLaunchFailure,
                fault.what(), &fault.finding);
  } catch (const Fault& fault) {  // no more room for what the checks know
    return fail(cudaErrorLaunchFailure, fault.what());
  } catch (const std::bad_alloc&) {
    return fail(cudaErrorMemoryAllocation, kernel.title + ": launch: no memory for its blocks" +
                                               (options.check ? " or for check=1" : ""));
  }
  return cudaSuccess;
}

}  // namespace ptxvm
