// State of the emulated CUDA runtime: modules, kernels by their host functions, errors.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "ptxvm/parse.h"

namespace ptxvm {

// What a fat binary holds for a device, or raw text for all.
struct Image {
  std::unique_ptr<Module> module;
  int error = 0;  // a CUDA error, if there is no module
  std::string report;
  std::map<std::string, uint32_t> registers;
};

// An image is read when one of its kernels or variables is used first on a device: a library may
// bring many.
struct LoadedModule {
  const void* fat_binary = nullptr;     // null: raw text
  std::map<const void*, Image> images;  // by the place of their text

  Image& open();  // of the device
};

// What a kernel handle points to.
struct KernelRecord {
  LoadedModule* loaded;
  std::string name;
  Kernel* kernel = nullptr;  // of the device where it was used last
};

struct VariableRecord {
  LoadedModule* loaded;
  std::string name;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<LoadedModule>> modules;
  std::unordered_map<const void*, std::unique_ptr<KernelRecord>> kernels;  // by host function
  std::unordered_map<const void*, VariableRecord> variables;               // by host shadow
  std::unordered_map<const void*, size_t> allocations;

  // Kernel of a host function or of a handle; null if there is none.
  KernelRecord* find(const void* function);
};

// Lives until the process ends: host code unregisters its modules while it exits.
Runtime& runtime();

LoadedModule* load(const std::string& ptx);
void unload(LoadedModule*);

// Records a failure of the calling thread for cudaGetLastError and cudaGetErrorString; returns the
// error.
int fail(int error, const std::string& report);
int last_error(bool clear);
std::string& last_report();              // of the thread's failure before
std::string report_of_error(int error);  // of that failure or of the device's, if it has this error

// The error of the kernel that failed last: as on a GPU every call returns it from then on. 0 if
// none has failed since recover().
int device_error();
void recover();

// Decodes a kernel if that is not done. 0, or a CUDA error that is recorded.
int prepare(KernelRecord*);

// Whether the device can run such a launch. 0, or a CUDA error that is recorded.
int check_launch(KernelRecord*, const uint32_t grid[3], const uint32_t block[3],
                 size_t dynamic_shared, const uint32_t* cluster, bool cooperative);

// Runs a kernel. 0, or a CUDA error that is recorded; on_device: also as that of the device. A
// cluster is that of the kernel where it is null. Blocks of a cooperative launch run together.
int launch(KernelRecord*, const uint32_t grid[3], const uint32_t block[3], size_t dynamic_shared,
           void** arguments, const uint32_t* cluster = nullptr, bool cooperative = false);
int launch_on_device(KernelRecord*, const uint32_t grid[3], const uint32_t block[3],
                     size_t dynamic_shared, void** arguments, const uint32_t* cluster = nullptr,
                     bool cooperative = false);

// Dynamic shared memory that a launch may ask for.
uint32_t dynamic_shared_limit(const Kernel&);

}  // namespace ptxvm
