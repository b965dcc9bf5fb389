#include "ptxvm/store_buffer.h"

#include <algorithm>
#include <unordered_map>

namespace ptxvm {
namespace {

// The last store to each byte, by address / 16.
struct Line {
  uint16_t stored = 0;  // a bit for each byte
  char data[16];
};
std::unordered_map<uint64_t, Line> last_stored;

bool overlap(const PendingStore& store, uint64_t address, uint32_t bytes) {
  return store.address < address + bytes && address < store.address + store.bytes;
}

bool is_of_thread(const PendingStore& store, const PendingStore& other) {
  return store.warp == other.warp && store.lane == other.lane;
}

bool must_precede(const PendingStore& earlier, const PendingStore& store) {
  return is_of_thread(earlier, store) &&
         (earlier.epoch < store.epoch || overlap(earlier, store.address, store.bytes));
}

// Writes the chosen stores, and those that must precede them, in the order of their issue.
template <typename Choose>
void land(Block& block, Choose choose) {
  auto& stores = block.stores;
  std::vector<bool> chosen(stores.size());
  bool any = false;
  for (size_t i = stores.size(); i-- > 0;) {
    chosen[i] = choose(stores[i]);
    for (size_t j = i + 1; j < stores.size() && !chosen[i]; ++j)
      chosen[i] = chosen[j] && must_precede(stores[i], stores[j]);
    any = any || chosen[i];
  }
  if (!any) return;
  size_t kept = 0;
  for (size_t i = 0; i < stores.size(); ++i) {
    if (chosen[i])
      std::memcpy(reinterpret_cast<void*>(stores[i].address), stores[i].data, stores[i].bytes);
    else
      stores[kept++] = stores[i];
  }
  stores.resize(kept);
}

}  // namespace

void defer_store(Warp& warp, int lane, uint64_t address, const void* data, uint32_t bytes) {
  // No other thread reads local memory.
  const Block& block = *warp.block;
  if (address - reinterpret_cast<uint64_t>(block.local) <
      uint64_t{block.threads} * block.kernel->local_bytes) {
    std::memcpy(reinterpret_cast<void*>(address), data, bytes);
    return;
  }
  PendingStore store{address,
                     warp.store_epoch,
                     warp.index,
                     static_cast<uint8_t>(bytes),
                     static_cast<uint8_t>(lane),
                     false,
                     {}};
  std::memcpy(store.data, data, bytes);
  warp.block->stores.push_back(store);
  if (!options.check) return;
  Line& line = last_stored[address / 16];
  line.stored |= static_cast<uint16_t>(((1u << bytes) - 1) << address % 16);
  std::memcpy(line.data + address % 16, data, bytes);
}

void read_last_stored(uint64_t address, uint32_t bytes, void* data) {
  const auto found = last_stored.find(address / 16);
  for (uint32_t i = 0; i < bytes; ++i) {
    const uint64_t at = address % 16 + i;
    const bool waited = found != last_stored.end() && found->second.stored >> at & 1;
    static_cast<char*>(data)[i] =
        waited ? found->second.data[at] : reinterpret_cast<const char*>(address)[i];
  }
}

void forget_last_stored() { last_stored.clear(); }

void settle_stores(Warp& warp, const uint64_t* addresses, Mask mask, uint32_t bytes,
                   bool all_before) {
  if (warp.block->stores.empty()) return;
  land(*warp.block, [&](const PendingStore& store) {
    const bool own = store.warp == warp.index;
    if (all_before && ((own && store.epoch < warp.store_epoch) || store.shared)) return true;
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      if ((store.shared || (own && store.lane == lane)) && overlap(store, addresses[lane], bytes))
        return true;
    }
    return false;
  });
}

void order_stores(Warp& warp) {
  ++warp.store_epoch;
  land(*warp.block, [](const PendingStore& store) { return store.shared; });
}

void share_stores(Warp& warp) {
  for (PendingStore& store : warp.block->stores) store.shared |= store.warp == warp.index;
}

void flush_stores(Warp& warp) {
  land(*warp.block,
       [&](const PendingStore& store) { return store.shared || store.warp == warp.index; });
}

void land_some_stores(Block& block, Random& random) {
  while (!block.stores.empty() && random.below(3) == 0) {
    const PendingStore* chosen = &block.stores[random.below(block.stores.size())];
    land(block, [&](const PendingStore& store) { return &store == chosen; });
  }
}

}  // namespace ptxvm
