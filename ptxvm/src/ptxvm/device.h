// Devices that the machine emulates: limits, and the newest PTX that each accepts.
#pragma once
#include <cstdint>
#include <string>

namespace ptxvm {

// Limits common to all supported devices.
constexpr uint32_t kMaxThreadsPerBlock = 1024;
constexpr uint32_t kMaxBlockExtent[3] = {1024, 1024, 64};
constexpr uint32_t kMaxGridExtent[3] = {0x7fffffff, 65535, 65535};
constexpr uint32_t kRegistersPerMultiprocessor = 65536;
constexpr uint32_t kSharedPerBlock = 48 * 1024;  // bytes, without an attribute
constexpr uint32_t kSharedReserved = 1024;       // bytes reserved by the system, per block
constexpr uint32_t kMaxCluster = 16, kMaxPortableCluster = 8;  // blocks

// CUDA C++ Programming Guide, technical specifications per compute capability.
struct Device {
  const char* name;
  int major, minor;
  uint32_t multiprocessors;
  uint32_t threads_per_multiprocessor, blocks_per_multiprocessor;
  uint32_t shared_per_multiprocessor;  // bytes
  uint32_t level2;                     // bytes
  uint32_t newest_ptx;                 // compute capability times 10
  bool specific;                       // accepts PTX of its own architecture, compute_90a
  uint32_t shared_per_block() const { return shared_per_multiprocessor - kSharedReserved; }
  bool has_clusters() const { return major >= 9; }
};

constexpr int kDevices = 5;

// The current device, and its position among the devices.
const Device& device();
int device_position();

// Each device that was ever chosen has an ordinal, in order of choice, so that state which host
// code keeps by ordinal belongs to that device. The name is one of sm_80, sm_86, sm_89, sm_90a,
// sm_120; false for any other name, and for an ordinal that no device has.
bool choose_device(const std::string& name);
bool choose_device(int ordinal);
const Device* device_of(int ordinal);
int device_ordinal();
int device_count();

// Number of SMs of a device; environment PTXVM_SMS overrides it.
uint32_t multiprocessors(const Device& = device());

// Blocks of a kernel that fit on one SM.
struct Kernel;
uint32_t blocks_per_multiprocessor(const Kernel&, uint32_t threads, uint32_t dynamic_shared);

}  // namespace ptxvm
