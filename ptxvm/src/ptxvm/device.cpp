#include "ptxvm/device.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <vector>

#include "ptxvm/machine.h"

namespace ptxvm {
namespace {

// sm_80 is an A100 with the SM count of an H100; the others are the largest chip of each
// capability. The machine knows no instruction introduced after compute capability 9.0.
constexpr Device kAll[] = {{"sm_80", 8, 0, 132, 2048, 32, 164 << 10, 50 << 20, 80, false},
                           {"sm_86", 8, 6, 84, 1536, 16, 100 << 10, 6 << 20, 86, false},
                           {"sm_89", 8, 9, 128, 1536, 24, 100 << 10, 72 << 20, 89, false},
                           {"sm_90a", 9, 0, 132, 2048, 32, 228 << 10, 50 << 20, 90, true},
                           {"sm_120", 12, 0, 170, 1536, 24, 100 << 10, 96 << 20, 90, false}};
static_assert(std::size(kAll) == kDevices);

// Positions by ordinal. A function, since options are set during static initialisation.
std::vector<int>& chosen() {
  static std::vector<int> positions;
  return positions;
}
int current = 0;  // position of the current device

int ordinal_of(int position) {
  auto& positions = chosen();
  const auto found = std::find(positions.begin(), positions.end(), position);
  if (found != positions.end()) return static_cast<int>(found - positions.begin());
  positions.push_back(position);
  return static_cast<int>(positions.size()) - 1;
}

}  // namespace

const Device& device() { return kAll[current]; }
int device_position() { return current; }
int device_ordinal() { return ordinal_of(current); }
int device_count() { return static_cast<int>(std::max<size_t>(chosen().size(), 1)); }

bool choose_device(const std::string& name) {
  const auto found = std::find_if(std::begin(kAll), std::end(kAll),
                                  [&](const Device& d) { return name == d.name; });
  if (found == std::end(kAll)) return false;
  current = static_cast<int>(found - std::begin(kAll));
  ordinal_of(current);
  return true;
}

bool choose_device(int ordinal) {
  const Device* const found = device_of(ordinal);
  if (found) current = static_cast<int>(found - kAll);
  return found;
}

const Device* device_of(int ordinal) {
  if (ordinal == device_ordinal()) return &device();
  return ordinal >= 0 && ordinal < device_count() ? &kAll[chosen()[ordinal]] : nullptr;
}

uint32_t multiprocessors(const Device& device) {
  static const uint32_t asked = [] {
    const char* text = std::getenv("PTXVM_SMS");
    const long value = text ? std::strtol(text, nullptr, 10) : 0;
    return static_cast<uint32_t>(std::max(value, 0l));
  }();
  return asked ? asked : device.multiprocessors;
}

uint32_t blocks_per_multiprocessor(const Kernel& kernel, uint32_t threads,
                                   uint32_t dynamic_shared) {
  if (threads == 0 || threads > kMaxThreadsPerBlock) return 0;
  const Device& limits = device();
  const uint32_t warps = (threads + kLanes - 1) / kLanes;
  const uint32_t shared = kernel.dynamic_offset + dynamic_shared + kSharedReserved;
  uint32_t blocks = std::min(limits.blocks_per_multiprocessor,
                             limits.threads_per_multiprocessor / (warps * kLanes));
  blocks = std::min(blocks, limits.shared_per_multiprocessor / shared);
  // Registers are allocated in units of 256 per warp.
  if (const uint32_t per_warp = (kernel.registers * kLanes + 255) / 256 * 256)
    blocks = std::min(blocks, kRegistersPerMultiprocessor / per_warp / warps);
  return blocks;
}

}  // namespace ptxvm
