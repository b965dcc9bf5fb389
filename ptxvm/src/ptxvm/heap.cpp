#include "ptxvm/heap.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "ptxvm/check.h"

namespace ptxvm {
namespace {

constexpr uint64_t kAlignment = 16;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Owned {
  std::unique_ptr<void, Free> memory;
  uint64_t bytes;
};

std::map<uint64_t, Owned> owned;
std::vector<Owned> freed;  // in this launch
uint64_t used = 0;

}  // namespace

size_t heap_limit = 8 << 20;

void* allocate_on_heap(uint64_t bytes) {
  if (bytes == 0 || bytes > heap_limit || used > heap_limit - bytes) return nullptr;
  const uint64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  void* const memory = std::aligned_alloc(kAlignment, rounded);
  if (!memory) return nullptr;
  std::memset(memory, 0xff, rounded);  // NaN wherever a kernel reads uninitialised memory
  owned.emplace(reinterpret_cast<uint64_t>(memory),
                Owned{std::unique_ptr<void, Free>(memory), bytes});
  used += bytes;
  register_memory(memory, bytes, true);
  return memory;
}

bool free_on_heap(uint64_t address) {
  const auto found = owned.find(address);
  if (found == owned.end()) return false;
  unregister_memory(found->second.memory.get());
  used -= found->second.bytes;
  freed.push_back(std::move(found->second));
  owned.erase(found);
  return true;
}

void heap_launched() { freed.clear(); }

void register_heap() {
  for (const auto& [address, allocation] : owned)
    register_memory(allocation.memory.get(), allocation.bytes, true);
}

}  // namespace ptxvm
