// State of the emulated CUDA runtime: modules, kernels by their host functions, errors.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptxvm/parse.h"

struct CUmemPoolHandle_st;

namespace ptxvm {

// Contents of a fat binary for one device, or raw text for all devices.
struct Image {
  std::unique_ptr<Module> module;
  int error = 0;  // a CUDA error, if there is no module
  std::string report;
  std::map<std::string, uint32_t> registers;
};

// An image is read when one of its kernels or variables is first used on a device: a library may
// contain many.
struct LoadedModule {
  const void* fat_binary = nullptr;     // null: raw text
  std::map<const void*, Image> images;  // indexed by the position of their text

  Image& open();  // of the current device
};

// Target of a kernel handle.
struct KernelRecord {
  LoadedModule* loaded;
  std::string name;
  Kernel* kernel = nullptr;  // for the device where it was last used
};

struct VariableRecord {
  LoadedModule* loaded;
  std::string name;
};

// Memory that the host program allocated. `pool`: null, or where it came from.
struct HostAllocation {
  size_t bytes;
  std::shared_ptr<CUmemPoolHandle_st> pool;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<LoadedModule>> modules;
  std::unordered_map<const void*, std::unique_ptr<KernelRecord>> kernels;  // by host function
  std::unordered_map<const void*, VariableRecord> variables;  // by host shadow variable
  std::unordered_map<const void*, HostAllocation> allocations;

  // Kernel of a host function or of a handle; null if there is none.
  KernelRecord* find(const void* function);
};

// Lives until the process ends: host code unregisters its modules while it exits.
Runtime& runtime();

LoadedModule* load(const std::string& ptx);
void unload(LoadedModule*);

// Records a failure of the calling thread for cudaGetLastError and cudaGetErrorString; returns the
// error. `finding`: the rule that a kernel broke, if one did.
struct Finding;
int fail(int error, const std::string& report, const Finding* finding = nullptr);
int last_error(bool clear);
std::string& last_report();              // of the thread's last failure
std::string& last_finding();             // its finding as JSON, or null
std::string report_of_error(int error);  // of that failure or of the device's, by its error

// Error of the kernel that failed last: as on a GPU, every later call returns it. 0 if no kernel
// has failed since recover().
int device_error();
void recover();

// Decodes a kernel unless it is decoded. 0, or a CUDA error that is recorded.
int prepare(KernelRecord*);

// Checks that the device can run such a launch. 0, or a CUDA error that is recorded.
int check_launch(KernelRecord*, const uint32_t grid[3], const uint32_t block[3],
                 size_t dynamic_shared, const uint32_t* cluster, bool cooperative);

// Runs a kernel. 0, or a CUDA error that is recorded; launch_on_device records it for the device
// too. Null `cluster`: the kernel's own cluster shape. Blocks of a cooperative launch run together.
int launch(KernelRecord*, const uint32_t grid[3], const uint32_t block[3], size_t dynamic_shared,
           void** arguments, const uint32_t* cluster = nullptr, bool cooperative = false);
int launch_on_device(KernelRecord*, const uint32_t grid[3], const uint32_t block[3],
                     size_t dynamic_shared, void** arguments, const uint32_t* cluster = nullptr,
                     bool cooperative = false);

// Maximum dynamic shared memory of a launch, in bytes.
uint32_t dynamic_shared_limit(const Kernel&);

}  // namespace ptxvm
