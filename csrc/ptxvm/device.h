// The device that the machine presents: compute capability 8.0 with the limits of an H100.
#pragma once
#include <cstdint>

namespace ptxvm {

constexpr int kComputeMajor = 8, kComputeMinor = 0;
constexpr uint32_t kMaxThreadsPerBlock = 1024;
constexpr uint32_t kMaxBlockExtent[3] = {1024, 1024, 64};
constexpr uint32_t kMaxGridExtent[3] = {0x7fffffff, 65535, 65535};
constexpr uint32_t kMaxThreadsPerMultiprocessor = 2048;
constexpr uint32_t kMaxBlocksPerMultiprocessor = 32;
constexpr uint32_t kRegistersPerMultiprocessor = 65536;
constexpr uint32_t kSharedPerBlock = 48 * 1024;        // without an attribute
constexpr uint32_t kSharedPerBlockOptIn = 163 * 1024;  // compute capability 8.0
constexpr uint32_t kSharedPerMultiprocessor = 164 * 1024;
constexpr uint32_t kSharedReserved = 1024;  // by the system, per block

// 132, or environment PTXVM_SMS.
uint32_t multiprocessors();

// Blocks of a kernel that fit into one multiprocessor.
struct Kernel;
uint32_t blocks_per_multiprocessor(const Kernel&, uint32_t threads, uint32_t dynamic_shared);

}  // namespace ptxvm
