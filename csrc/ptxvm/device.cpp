#include "ptxvm/device.h"

#include <algorithm>
#include <cstdlib>

#include "ptxvm/machine.h"

namespace ptxvm {

uint32_t multiprocessors() {
  static const uint32_t count = [] {
    const char* text = std::getenv("PTXVM_SMS");
    const long value = text ? std::strtol(text, nullptr, 10) : 0;
    return value > 0 ? static_cast<uint32_t>(value) : 132u;
  }();
  return count;
}

uint32_t blocks_per_multiprocessor(const Kernel& kernel, uint32_t threads,
                                   uint32_t dynamic_shared) {
  if (threads == 0 || threads > kMaxThreadsPerBlock) return 0;
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  const uint32_t shared = kernel.dynamic_offset + dynamic_shared + kSharedReserved;
  uint32_t blocks =
      std::min(kMaxBlocksPerMultiprocessor, kMaxThreadsPerMultiprocessor / (warps * kLanes));
  blocks = std::min(blocks, kSharedPerMultiprocessor / shared);
  // Registers are given out in units of 256 per warp.
  if (const uint32_t per_warp = (kernel.registers * kLanes + 255) / 256 * 256)
    blocks = std::min(blocks, kRegistersPerMultiprocessor / per_warp / warps);
  return blocks;
}

}  // namespace ptxvm
