#include "ptxvm/check.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "ptxvm/shadow.h"

namespace ptxvm {
namespace {

// A stamp: 24 bits of the block's epoch, whether a copy is in flight, whether all of these accesses
// were strong (atomic, volatile, relaxed, acquire, release: these do not race with one another),
// and 1 + the warp or kSeveral. Two warps that meet in one epoch had no barrier between them.
constexpr int kEpochShift = 8;
constexpr uint32_t kCopying = 128, kStrong = 64, kWho = 63, kSeveral = 63;
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

template <int bytes>
uint32_t mark_read(const uint32_t* writers, uint32_t* readers, uint32_t mine) {
  uint32_t wrong = 0;
  for (int b = 0; b < bytes; ++b) {
    wrong |= conflict(writers[b], mine) | (writers[b] & kCopying) | (writers[b] == 0);
    readers[b] = merge(readers[b], mine);
  }
  return wrong;
}

template <int bytes>
uint32_t mark_write(uint32_t* writers, const uint32_t* readers, uint32_t mine, uint32_t unset) {
  uint32_t wrong = 0;
  for (int b = 0; b < bytes; ++b) {
    wrong |= conflict(writers[b], mine) | conflict(readers[b], mine) | (writers[b] & kCopying) |
             (uint32_t{writers[b] == 0} & unset);
    writers[b] = merge(writers[b], mine);
  }
  return wrong;
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
    if (reads && !writers[b])
      fault(warp, instruction, lane, std::string("read of uninitialised ") + place);
  }
  fault(warp, instruction, lane, "shared access broke a rule");
}

uint32_t first_unit(uint32_t slot) { return slot / kUnit; }

// Moving a value that was never set is harmless, and compilers do it.
bool moves(const Instruction& instruction) { return !std::strncmp(instruction.text, "mov", 3); }

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
  const bool reads = is_read(kind) || kind == Access::atomic;
  uint32_t wrong = 0;
  if (is_read(kind)) {
    switch (bytes) {
      case 1:
        wrong = mark_read<1>(writers, readers, mine);
        break;
      case 2:
        wrong = mark_read<2>(writers, readers, mine);
        break;
      case 4:
        wrong = mark_read<4>(writers, readers, mine);
        break;
      case 8:
        wrong = mark_read<8>(writers, readers, mine);
        break;
      default:
        wrong = mark_read<16>(writers, readers, mine);
    }
  } else {
    switch (bytes) {
      case 1:
        wrong = mark_write<1>(writers, readers, mine, reads);
        break;
      case 2:
        wrong = mark_write<2>(writers, readers, mine, reads);
        break;
      case 4:
        wrong = mark_write<4>(writers, readers, mine, reads);
        break;
      case 8:
        wrong = mark_write<8>(writers, readers, mine, reads);
        break;
      default:
        wrong = mark_write<16>(writers, readers, mine, reads);
    }
  }
  if (wrong)
    explain(warp, instruction, offset, lane, bytes, mine, !is_read(kind), reads, before_writers,
            before_readers);
}

void shadow_local(Warp& warp, const Instruction& instruction, uint64_t offset, int lane,
                  uint32_t bytes, Access kind) {
  uint8_t* written = warp.block->shadow->local_written.data() + offset;
  // Padding between the members of a struct is copied along with them: one byte is enough.
  if (is_read(kind) && std::find(written, written + bytes, 1) == written + bytes)
    fault(warp, instruction, lane,
          "read of uninitialised local memory, byte " +
              std::to_string(offset % warp.block->kernel->local_bytes) + " of the thread");
  if (!is_read(kind)) std::fill_n(written, bytes, uint8_t{1});
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
  block.shadow->writers.assign(block.shared_bytes, 0);
  block.shadow->readers.assign(block.shared_bytes, 0);
  block.shadow->local_written.assign(size_t{kernel.local_bytes} * block.warps.size() * kLanes, 0);
  for (Warp& warp : block.warps) {
    warp.defined.assign(kernel.file_bytes / kUnit + 1, 0);
    for (const auto& constant : kernel.constants)
      warp.defined[first_unit(constant.slot)] = kFullMask;
    for (const auto& special : kernel.specials) warp.defined[first_unit(special.slot)] = kFullMask;
  }
}

void block_finished(Block& block) { block.shadow.reset(); }

// Any barrier ends the epoch, also one of some of the warps: what those that stayed away did before
// it is forgotten, which can hide a race but never invents one.
void barrier_released(Block& block) { ++block.epoch; }

void check_registers(Warp& warp, const Instruction& instruction, Mask mask) {
  if (warp.defined.empty()) return;
  const auto require = [&](uint32_t slot, int number) {
    const Mask missing = mask & ~warp.defined[first_unit(slot)];
    if (missing && !(moves(instruction) && slot != instruction.guard))
      fault(warp, instruction, __builtin_ctz(missing),
            std::string("read of an uninitialised register: ") +
                (number ? "source " + std::to_string(number) : "the guard"));
  };
  if (instruction.guard != kNoSlot) require(instruction.guard, 0);
  for (int i = 0; i < instruction.reads; ++i) {
    const uint32_t slot = instruction.slots[instruction.writes + i];
    if (slot != kNoSlot) require(slot, i + 1);
  }
}

void define_registers(Warp& warp, const Instruction& instruction, Mask mask) {
  if (warp.defined.empty()) return;
  Mask held = kFullMask;  // but for a move, check_registers has seen to that
  for (int i = 0; i < instruction.reads; ++i) {
    const uint32_t slot = instruction.slots[instruction.writes + i];
    if (slot != kNoSlot) held &= warp.defined[first_unit(slot)];
  }
  for (int i = 0; i < instruction.writes; ++i) {
    const uint32_t slot = instruction.slots[i];
    if (slot == kNoSlot) continue;
    Mask& defined = warp.defined[first_unit(slot)];
    defined = (defined & ~mask) | (held & mask);
  }
}

}  // namespace ptxvm
