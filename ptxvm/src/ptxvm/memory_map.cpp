// Memory that a kernel may access: the registered allocations of global memory, and the extents of
// a block's shared, local and parameter memory.
#include <algorithm>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>

#include "ptxvm/async.h"
#include "ptxvm/check.h"
#include "ptxvm/counters.h"
#include "ptxvm/reports.h"
#include "ptxvm/shadow.h"

namespace ptxvm {
namespace {

struct Extent {
  uint64_t begin = 0, bytes = 0;
  bool constant = true;  // no part of it may be written
  bool holds(uint64_t address, uint64_t size) const {
    return address - begin <= bytes && bytes - (address - begin) >= size;
  }
};

struct Allocation {
  Extent extent;
  bool writable;
};

std::vector<Allocation> allocations;

// Union of the allocations that may be read or written: views of one tensor overlap. Adjacent
// extents stay separate, so that running off the end of one is detected. Ascending.
struct Reachable {
  std::vector<Extent> extents;
  Extent last;  // hit of the last query

  const Extent* find(uint64_t address, uint64_t size) {
    if (last.holds(address, size)) return &last;
    auto next = std::upper_bound(extents.begin(), extents.end(), address,
                                 [](uint64_t a, const Extent& e) { return a < e.begin; });
    if (next == extents.begin() || !(next - 1)->holds(address, size)) return nullptr;
    last = *(next - 1);
    return &last;
  }
};
Reachable readable, writable;
bool outdated = false;

Reachable unite(bool writable_only) {
  std::vector<Extent> all;
  for (const Allocation& a : allocations)
    if (a.extent.bytes && (a.writable || !writable_only))
      all.push_back({a.extent.begin, a.extent.bytes, !a.writable});
  std::sort(all.begin(), all.end(),
            [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  Reachable result;
  for (const Extent& e : all) {
    if (!result.extents.empty()) {
      Extent& back = result.extents.back();
      if (e.begin < back.begin + back.bytes) {
        back.bytes = std::max(back.bytes, e.begin + e.bytes - back.begin);
        back.constant = back.constant && e.constant;
        continue;
      }
    }
    result.extents.push_back(e);
  }
  return result;
}

Reachable& reachable(Access kind) {
  if (outdated) {
    readable = unite(false);
    writable = unite(true);
    outdated = false;
  }
  return kind == Access::read || kind == Access::strong_read ? readable : writable;
}

std::string format(const char* pattern, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

const char* verb(Access kind) {
  switch (kind) {
    case Access::read:
    case Access::strong_read:
      return "read";
    case Access::atomic:
      return "atomic access";
    default:
      return "write";
  }
}

std::string describe_global(uint64_t address, uint32_t bytes, Access kind) {
  std::string text =
      format("%s of %u bytes at global address 0x%" PRIx64, verb(kind), bytes, address);
  if (reachable(Access::read).find(address, bytes)) return text + ": the allocation is read-only";
  const Extent* nearest = nullptr;
  uint64_t distance = ~uint64_t{0};
  for (const Extent& e : reachable(Access::read).extents) {
    const uint64_t end = e.begin + e.bytes;
    const uint64_t away = address < e.begin ? e.begin - address : address < end ? 0 : address - end;
    if (away < distance) {
      distance = away;
      nearest = &e;
    }
  }
  if (!nearest) return text + ": no memory is registered";
  text += ": outside every allocation; the nearest is 0x" +
          format("%" PRIx64 " of %" PRIu64 " bytes, ", nearest->begin, nearest->bytes);
  const uint64_t end = nearest->begin + nearest->bytes;
  if (address < nearest->begin)
    return text + format("the access begins %" PRIu64 " bytes before it", nearest->begin - address);
  if (address >= end)
    return text + format("the access begins %" PRIu64 " bytes past its end", address - end);
  return text + format("the access ends %" PRIu64 " bytes past its end", address + bytes - end);
}

const char* space_name(Space space) {
  switch (space) {
    case Space::shared:
    case Space::cluster:
      return "shared";
    case Space::local:
      return "local";
    case Space::param:
      return "parameter";
    case Space::constant:
      return "constant";
    default:
      return "global";
  }
}

// The window resolves generic addresses; parameter variables of calls lie in local memory.
Space real_space(Space space, uint64_t address) {
  const uint64_t window = address & kWindowMask;
  const Space shared = address >> kRankShift & kRankMask ? Space::cluster : Space::shared;
  if (space == Space::cluster) return shared;
  if (space == Space::generic)
    return window == kSharedWindow  ? shared
           : window == kLocalWindow ? Space::local
           : window == kParamWindow ? Space::param
                                    : Space::global;
  return space == Space::param && window == kLocalWindow ? Space::local : space;
}

struct Place {
  char* host;
  uint64_t bytes;
};

Place windowed(Warp& warp, Space space, int lane) {
  const Block& block = *warp.block;
  if (space == Space::shared) return {block.shared, block.shared_bytes};
  if (space == Space::param)
    return {const_cast<char*>(block.parameters), block.kernel->parameter_bytes};
  const uint64_t bytes = block.kernel->local_bytes;
  return {block.local + bytes * (warp.index * kLanes + lane), bytes};
}

// An access outside of all memory: a fault or, if kernels go on, a scratch buffer of the lane: it
// reads as all ones (NaN), and its writes are discarded.
char* no_memory(Warp& warp, const Instruction& instruction, int lane, const std::string& what) {
  const std::string_view opcode = opcode_of(instruction), base = opcode.substr(0, opcode.find('.'));
  const bool may_go_on = base == "ld" || base == "ldu" || base == "st" || base == "atom" ||
                         base == "red" || base == "ldmatrix" || base == "stmatrix" ||
                         base == "wmma";
  if (!options.go_on || !may_go_on) fault(warp, instruction, lane, what);
  broke_rule(warp, instruction, lane, "memory", what);
  alignas(16) thread_local char bytes[kLanes][16];
  std::memset(bytes[lane], 0xff, sizeof bytes[lane]);
  return bytes[lane];
}

std::string beyond(uint64_t offset, uint32_t bytes, uint64_t extent) {
  return offset + bytes > extent ? format(" bytes, the access ends %" PRIu64 " bytes past its end",
                                          offset + bytes - extent)
                                 : std::string(" bytes");
}

char* access_cluster(Warp& warp, const Instruction& instruction, uint64_t address, int lane,
                     uint32_t bytes, Access kind) {
  Block& target = block_of(warp, instruction, lane, address);
  if (address + bytes > target.shared_bytes)
    return no_memory(warp, instruction, lane,
                     format("%s of %u bytes at shared address 0x%" PRIx64
                            " of block %u of the cluster: its shared memory has %u",
                            verb(kind), bytes, address, target.rank, target.shared_bytes) +
                         beyond(address, bytes, target.shared_bytes));
  if (target.shadow) {
    uint64_t offsets[kLanes];
    offsets[lane] = address;
    shadow_shared(warp, instruction, target, offsets, Mask{1} << lane, bytes, kind);
    // A strong access is exempt: its value may already tell the other block that it has happened.
    if (kind < Access::strong_read) reached(warp, instruction, lane, target);
  }
  return target.shared + address;
}

}  // namespace

Block& block_of(Warp& warp, const Instruction& instruction, int lane, uint64_t& address) {
  const uint64_t rank = address >> kRankShift & kRankMask;
  address &= (uint64_t{1} << kRankShift) - 1;
  if (!rank) return *warp.block;
  const Cluster& cluster = *warp.block->cluster;
  if (rank > cluster.blocks.size())
    fault(warp, instruction, lane,
          format("block %u of a cluster of %u", static_cast<unsigned>(rank - 1),
                 static_cast<unsigned>(cluster.blocks.size())));
  Block& block = *cluster.blocks[rank - 1];
  if (block.exited == block.threads)
    fault(warp, instruction, lane,
          format("shared memory of block %u of the cluster, which has finished", block.rank));
  return block;
}

bool is_constant(uint64_t address, uint32_t bytes) {
  const Extent* const extent = reachable(Access::read).find(address, bytes);
  return extent && extent->constant;
}

void register_memory(const void* base, size_t bytes, bool can_write) {
  allocations.push_back({{reinterpret_cast<uint64_t>(base), bytes}, can_write});
  outdated = true;
}

void unregister_memory(const void* base) {
  const uint64_t begin = reinterpret_cast<uint64_t>(base);
  const auto found = std::find_if(allocations.begin(), allocations.end(),
                                  [&](const Allocation& a) { return a.extent.begin == begin; });
  if (found == allocations.end()) return;
  allocations.erase(found);
  outdated = true;
}

void unregister_all_memory() {
  allocations.clear();
  outdated = true;
}

Where locate(const void* base, size_t bytes, Access kind) {
  const auto begin = reinterpret_cast<uint64_t>(base);
  if (reachable(kind).find(begin, bytes)) return Where::inside;
  for (const Extent& e : reachable(Access::read).extents)
    if (begin < e.begin + e.bytes && e.begin < begin + bytes) return Where::across;
  return Where::outside;
}

void require_global(Warp& warp, const Instruction& instruction, int lane, uint64_t address,
                    uint32_t bytes, uint32_t alignment, Access kind) {
  if (address % alignment)
    fault(warp, instruction, lane,
          format("misaligned %s: global address 0x%" PRIx64 " is not a multiple of %u bytes",
                 verb(kind), address, alignment));
  if (!reachable(kind).find(address, bytes))
    fault(warp, instruction, lane, describe_global(address, bytes, kind));
}

char* access(Warp& warp, const Instruction& instruction, Space space, uint64_t address, int lane,
             uint32_t bytes, Access kind) {
  space = real_space(space, address);
  if (address & (bytes - 1))
    return no_memory(warp, instruction, lane,
                     format("misaligned %s: %s address 0x%" PRIx64 " is not a multiple of %u bytes",
                            verb(kind), space_name(space), address, bytes));
  if (space == Space::cluster) return access_cluster(warp, instruction, address, lane, bytes, kind);
  if (space == Space::global || space == Space::constant) {
    const Extent* extent = reachable(kind).find(address, bytes);
    if (!extent) return no_memory(warp, instruction, lane, describe_global(address, bytes, kind));
    if (!extent->constant && warp.timeline) {
      uint64_t addresses[kLanes];
      addresses[lane] = address;
      shadow_global(warp, instruction, addresses, Mask{1} << lane, bytes, kind);
    }
    return reinterpret_cast<char*>(address);
  }
  const uint64_t offset = address & ~kWindowMask;
  const Place place = windowed(warp, space, lane);
  if (offset > place.bytes || place.bytes - offset < bytes)
    return no_memory(
        warp, instruction, lane,
        format("%s of %u bytes at %s address 0x%" PRIx64 ": the %s memory of the %s has %" PRIu64
               " bytes, the access ends %" PRIu64 " bytes past its end",
               verb(kind), bytes, space_name(space), offset, space_name(space),
               space == Space::local ? "thread" : "block", place.bytes,
               offset + bytes - place.bytes));
  if (warp.block->shadow) {
    uint64_t offsets[kLanes];
    offsets[lane] = offset;
    if (space == Space::shared)
      shadow_shared(warp, instruction, *warp.block, offsets, Mask{1} << lane, bytes, kind);
    if (space == Space::local)
      shadow_local(warp, instruction, place.host + offset - warp.block->local, lane, bytes, kind);
  }
  return place.host + offset;
}

void resolve(Warp& warp, const Instruction& instruction, Space space, uint64_t* addresses,
             Mask mask, uint32_t bytes, Access kind) {
  const int first = __builtin_ctz(mask);
  if (mask != kFullMask) {
    const uint64_t stand_in = addresses[first];
    for (int i = 0; i < kLanes; ++i) addresses[i] = mask >> i & 1 ? addresses[i] : stand_in;
  }
  const Space real = real_space(space, addresses[first]);
  uint64_t begin = 0, size = 0, host = 0;
  bool constant = false;
  if (real == Space::global || real == Space::constant) {
    if (const Extent* extent = reachable(kind).find(addresses[first], bytes)) {
      begin = host = extent->begin;
      size = extent->bytes;
      constant = extent->constant;
    }
  } else if (real != Space::local && real != Space::cluster) {
    const Place place = windowed(warp, real, first);
    host = reinterpret_cast<uint64_t>(place.host);
    size = place.bytes;
    begin = addresses[first] & kWindowMask;
  }
  if (size >= bytes) {
    const uint64_t limit = size - bytes, low_bits = bytes - 1;
    uint64_t wrong = 0;
    for (int i = 0; i < kLanes; ++i)
      wrong |= uint64_t{addresses[i] - begin > limit} | (addresses[i] & low_bits);
    if (!wrong) {
      if (real == Space::shared && warp.block->shadow) {
        uint64_t offsets[kLanes];
        for (int i = 0; i < kLanes; ++i) offsets[i] = addresses[i] - begin;
        shadow_shared(warp, instruction, *warp.block, offsets, mask, bytes, kind);
      }
      if (real == Space::global && !constant && warp.timeline)
        shadow_global(warp, instruction, addresses, mask, bytes, kind);
      for (int i = 0; i < kLanes; ++i) addresses[i] += host - begin;
      return;
    }
  }
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    addresses[i] =
        reinterpret_cast<uint64_t>(access(warp, instruction, space, addresses[i], i, bytes, kind));
  }
  if (mask != kFullMask)
    for (int i = 0; i < kLanes; ++i) addresses[i] = mask >> i & 1 ? addresses[i] : addresses[first];
}

}  // namespace ptxvm
