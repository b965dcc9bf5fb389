#include "ptxvm/check.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "ptxvm/shadow.h"

namespace ptxvm {
namespace {

// A stamp: 23 bits of the block's epoch, whether the byte holds no value, whether a copy is in
// flight, whether all of these accesses were strong (atomic, volatile, relaxed, acquire, release:
// these do not race with one another), and 1 + the warp or kSeveral. Two warps that meet in one
// epoch had no barrier between them.
constexpr int kEpochShift = 9;
constexpr uint32_t kUnset = 256, kCopying = 128, kStrong = 64, kWho = 63, kSeveral = 63;
constexpr uint32_t kUnit = 64;  // bytes of the register file per entry of Warp::defined

bool is_strong(Access kind) { return kind >= Access::strong_read; }
bool is_read(Access kind) { return kind == Access::read || kind == Access::strong_read; }

uint32_t stamp(const Warp& warp, Access kind) {
  return warp.block->epoch << kEpochShift | (is_strong(kind) ? kStrong : 0) | (warp.index + 1);
}

// The rules, free of branches so that they vectorise over the bytes of an access.
uint32_t same_epoch(uint32_t a, uint32_t b) { return a >> kEpochShift == b >> kEpochShift; }
uint32_t conflict(uint32_t theirs, uint32_t mine) {
  return same_epoch(theirs, mine) & (((theirs ^ mine) & kWho) != 0) &
         ((theirs & mine & kStrong) == 0);
}
uint32_t merge(uint32_t theirs, uint32_t mine) {
  const uint32_t strong = mine & (theirs | ~kStrong);
  const uint32_t both = (theirs ^ mine) & kWho ? strong | kSeveral : strong;
  return same_epoch(theirs, mine) ? both : mine;
}

struct Findings {
  uint32_t broken = 0, unset = 0;  // 0 if not
};

template <int bytes>
Findings mark_read(const uint32_t* writers, uint32_t* readers, uint32_t mine) {
  Findings found;
  for (int b = 0; b < bytes; ++b) {
    found.broken |= conflict(writers[b], mine) | (writers[b] & kCopying);
    found.unset |= writers[b] & kUnset;
    readers[b] = merge(readers[b], mine);
  }
  return found;
}

template <int bytes>
Findings mark_write(uint32_t* writers, const uint32_t* readers, uint32_t mine) {
  Findings found;
  for (int b = 0; b < bytes; ++b) {
    found.broken |=
        conflict(writers[b], mine) | conflict(readers[b], mine) | (writers[b] & kCopying);
    found.unset |= writers[b] & kUnset;
    writers[b] = merge(writers[b], mine);
  }
  return found;
}

template <int bytes>
Findings mark(uint32_t* writers, uint32_t* readers, uint32_t mine, bool writes) {
  return writes ? mark_write<bytes>(writers, readers, mine)
                : mark_read<bytes>(writers, readers, mine);
}

std::string who(uint32_t theirs) {
  if ((theirs & kWho) == kSeveral) return "several warps";
  return "warp " + std::to_string((theirs & kWho) - 1);
}

// Says which byte of an access broke which rule, given the stamps from before it.
[[noreturn]] void explain(Warp& warp, const Instruction& instruction, uint64_t offset, int lane,
                          uint32_t bytes, uint32_t mine, bool writes, bool reads,
                          const uint32_t* writers, const uint32_t* readers) {
  for (uint32_t b = 0; b < bytes; ++b) {
    char place[64];
    snprintf(place, sizeof place, "shared address 0x%" PRIx64, offset + b);
    const std::string act = std::string(writes ? "write to " : "read of ") + place;
    if (writers[b] & kCopying)
      fault(warp, instruction, lane,
            act + " while a cp.async of " + who(writers[b]) +
                " into it is in flight (no cp.async.wait_group or wait_all since)");
    if (conflict(writers[b], mine))
      fault(warp, instruction, lane,
            "race: " + act + ", written by " + who(writers[b]) + " since the last barrier");
    if (writes && conflict(readers[b], mine))
      fault(warp, instruction, lane,
            "race: " + act + ", read by " + who(readers[b]) + " since the last barrier");
    if (reads && writers[b] & kUnset)
      fault(warp, instruction, lane, std::string("read of uninitialised ") + place);
  }
  fault(warp, instruction, lane, "shared access broke a rule");
}

uint32_t first_unit(uint32_t slot) { return slot / kUnit; }

void load_unset(Warp& warp, const Instruction& instruction, int lane) {
  Undefined& undefined = warp.undefined;
  if (undefined.by != &instruction) undefined = {&instruction, &instruction};
  undefined.loaded |= Mask{1} << lane;
}

// Whether byte b of what the lane stores has no value.
bool stores_unset(const Warp& warp, const Instruction& instruction, int lane, uint32_t b) {
  const Undefined& undefined = warp.undefined;
  return undefined.by == &instruction && undefined.values[b / instruction.width] >> lane & 1;
}

}  // namespace

void shadow_shared(Warp& warp, const Instruction& instruction, uint64_t offset, int lane,
                   uint32_t bytes, Access kind) {
  SharedShadow& shadow = *warp.block->shadow;
  uint32_t* writers = shadow.writers.data() + offset;
  uint32_t* readers = shadow.readers.data() + offset;
  uint32_t before_writers[16], before_readers[16];
  std::copy_n(writers, bytes, before_writers);
  std::copy_n(readers, bytes, before_readers);
  const uint32_t mine = stamp(warp, kind);
  const bool writes = !is_read(kind);
  Findings found;
  switch (bytes) {
    case 1:
      found = mark<1>(writers, readers, mine, writes);
      break;
    case 2:
      found = mark<2>(writers, readers, mine, writes);
      break;
    case 4:
      found = mark<4>(writers, readers, mine, writes);
      break;
    case 8:
      found = mark<8>(writers, readers, mine, writes);
      break;
    default:
      found = mark<16>(writers, readers, mine, writes);
  }
  if (found.broken || (found.unset && kind == Access::atomic))
    explain(warp, instruction, offset, lane, bytes, mine, writes, kind == Access::atomic,
            before_writers, before_readers);
  if (found.unset && !writes) load_unset(warp, instruction, lane);
  if (writes && warp.undefined.by == &instruction)
    for (uint32_t b = 0; b < bytes; ++b)
      if (stores_unset(warp, instruction, lane, b)) writers[b] |= kUnset;
}

void shadow_local(Warp& warp, const Instruction& instruction, uint64_t offset, int lane,
                  uint32_t bytes, Access kind) {
  uint8_t* written = warp.block->shadow->local_written.data() + offset;
  // Padding between the members of a struct is copied along with them: one byte is enough.
  if (is_read(kind) && std::find(written, written + bytes, 1) == written + bytes)
    load_unset(warp, instruction, lane);
  if (!is_read(kind))
    for (uint32_t b = 0; b < bytes; ++b) written[b] = !stores_unset(warp, instruction, lane, b);
}

void copy_issued(Warp& warp, const Instruction& instruction, const AsyncCopy& copy) {
  shadow_shared(warp, instruction, copy.destination, copy.lane, copy.bytes, Access::write);
  uint32_t* writers = warp.block->shadow->writers.data() + copy.destination;
  for (int b = 0; b < copy.bytes; ++b) writers[b] |= kCopying;
}

void copy_landed(Warp& warp, const AsyncCopy& copy) {
  uint32_t* writers = warp.block->shadow->writers.data() + copy.destination;
  std::fill_n(writers, copy.bytes, stamp(warp, Access::write));
}

void fence_executed(Warp& warp) {
  if (warp.block->shadow) ++warp.block->epoch;
}

void block_started(Block& block) {
  if (!options.check) return;
  const Kernel& kernel = *block.kernel;
  block.shadow = std::make_unique<SharedShadow>();
  block.shadow->writers.assign(block.shared_bytes, kUnset);
  block.shadow->readers.assign(block.shared_bytes, 0);
  block.shadow->local_written.assign(size_t{kernel.local_bytes} * block.warps.size() * kLanes, 0);
  for (Warp& warp : block.warps) {
    warp.defined.assign(kernel.file_bytes / kUnit + 1, 0);
    warp.origins.assign(warp.defined.size(), nullptr);
    warp.undefined = {};
    for (const auto& constant : kernel.constants) warp.defined[constant.slot / kUnit] = kFullMask;
    for (const auto& special : kernel.specials) warp.defined[special.slot / kUnit] = kFullMask;
  }
}

void block_finished(Block& block) { block.shadow.reset(); }

// Any barrier ends the epoch, also one of some of the warps: what those that stayed away did before
// it is forgotten, which can hide a race but never invents one.
void barrier_released(Block& block) { ++block.epoch; }

}  // namespace ptxvm
