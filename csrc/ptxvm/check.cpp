#include "ptxvm/check.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "ptxvm/reports.h"
#include "ptxvm/shadow.h"

namespace ptxvm {
namespace {

// A stamp: 23 bits of the block's epoch, whether the byte holds no value, whether a copy is in
// flight, whether all of these accesses were strong (atomic, volatile, relaxed, acquire, release:
// these do not race with one another), and 1 + the warp or kSeveral. Two warps that meet in one
// epoch had no barrier between them.
constexpr int kEpochShift = 9;
// A bulk copy in flight is a strong one, which no copy of cp.async is.
constexpr uint32_t kUnset = 256, kCopying = 128, kStrong = 64, kWho = 63, kSeveral = 63;
constexpr uint32_t kSettled = 0;  // as a stamp: written before every epoch
constexpr uint32_t kUnit = 64;    // bytes of the register file per entry of Warp::defined

bool is_strong(Access kind) { return kind >= Access::strong_read; }
bool is_read(Access kind) { return kind == Access::read || kind == Access::strong_read; }

uint32_t stamp(const Warp& warp, Access kind) {
  return warp.block->epoch << kEpochShift | (is_strong(kind) ? kStrong : 0) | (warp.index + 1);
}

bool conflict(uint32_t theirs, uint32_t mine) {
  return theirs >> kEpochShift == mine >> kEpochShift && (theirs ^ mine) & kWho &&
         !(theirs & mine & kStrong);
}

std::string who(uint32_t theirs) {
  if ((theirs & kWho) == kSeveral) return "several warps";
  return "warp " + std::to_string((theirs & kWho) - 1);
}

// Says which byte of an access broke which rule, given the stamps from before it.
void explain(Warp& warp, const Instruction& instruction, uint64_t offset, int lane, uint32_t bytes,
             uint32_t mine, bool writes, bool reads, const uint32_t* writers,
             const uint32_t* readers) {
  for (uint32_t b = 0; b < bytes; ++b) {
    char place[64];
    snprintf(place, sizeof place, "shared address 0x%" PRIx64, offset + b);
    const std::string act = std::string(writes ? "write to " : "read of ") + place;
    const auto broke = [&](const char* rule, const std::string& what) {
      broke_rule(warp, instruction, lane, rule, what);
    };
    if (writers[b] & kCopying && writers[b] & kStrong)
      return broke("copy", act + " while a bulk copy of " + who(writers[b]) +
                               " into it is in flight (its mbarrier has not completed)");
    if (writers[b] & kCopying)
      return broke("copy", act + " while a cp.async of " + who(writers[b]) +
                               " into it is in flight (no cp.async.wait_group or wait_all since)");
    if (conflict(writers[b], mine))
      return broke("race with a write",
                   "race: " + act + ", written by " + who(writers[b]) + " since the last barrier");
    if (writes && conflict(readers[b], mine))
      return broke("race with a read",
                   "race: " + act + ", read by " + who(readers[b]) + " since the last barrier");
    if (reads && writers[b] & kUnset)
      return broke("uninitialised", std::string("read of uninitialised ") + place);
  }
}

// unset: whether byte b of what the lane loads has no value. A load loses the elements that have
// such a byte (width: bytes of one), an ldmatrix the row.
template <typename Unset>
void load_unset(Warp& warp, const Instruction& instruction, int lane, int bytes, Unset unset) {
  Undefined& undefined = warp.undefined;
  if (undefined.by != &instruction) undefined = {&instruction, &instruction};
  for (int b = 0; b < bytes; ++b)
    if (unset(b))
      (instruction.width ? undefined.values[b / instruction.width] : undefined.loaded) |= Mask{1}
                                                                                          << lane;
}

// Whether byte b of what the lane stores has no value.
bool stores_unset(const Warp& warp, const Instruction& instruction, int lane, uint32_t b) {
  const Undefined& undefined = warp.undefined;
  return undefined.by == &instruction && undefined.values[b / instruction.width] >> lane & 1;
}

// One lane. The stamps are looked at before they change, so that a report shows what was there.
// Vectors of one stamp per byte, because compilers unroll these loops before they vectorise them;
// conflict() above says the rule for one byte.
template <int bytes>
void shadow_lane(Warp& warp, const Instruction& instruction, uint64_t offset, int lane, Access kind,
                 uint32_t mine) {
  using Stamps [[gnu::vector_size(4 * bytes)]] = uint32_t;
  uint32_t* writers = warp.block->shadow->writers.data() + offset;
  uint32_t* readers = warp.block->shadow->readers.data() + offset;
  const bool writes = !is_read(kind), atomic = kind == Access::atomic;
  Stamps wrote, read, all_mine = Stamps{} + mine;
  std::memcpy(&wrote, writers, sizeof wrote);
  std::memcpy(&read, readers, sizeof read);
  const Stamps now_wrote = reinterpret_cast<Stamps>((wrote ^ all_mine) >> kEpochShift == 0);
  const Stamps now_read = reinterpret_cast<Stamps>((read ^ all_mine) >> kEpochShift == 0);
  const Stamps other_wrote = reinterpret_cast<Stamps>(((wrote ^ all_mine) & kWho) != 0);
  const Stamps other_read = reinterpret_cast<Stamps>(((read ^ all_mine) & kWho) != 0);
  const Stamps strong_wrote = reinterpret_cast<Stamps>((wrote & all_mine & kStrong) != 0);
  const Stamps strong_read = reinterpret_cast<Stamps>((read & all_mine & kStrong) != 0);
  Stamps broken = (now_wrote & other_wrote & ~strong_wrote) | (wrote & kCopying);
  if (writes) broken |= now_read & other_read & ~strong_read;
  uint32_t rules[bytes], any_broken = 0, any_unset = 0;
  std::memcpy(rules, &broken, sizeof rules);
  for (int b = 0; b < bytes; ++b) any_broken |= rules[b];
  for (int b = 0; b < bytes; ++b) any_unset |= writers[b] & kUnset;
  if (any_broken || (any_unset && atomic))
    explain(warp, instruction, offset, lane, bytes, mine, writes, atomic, writers, readers);
  const Stamps before = writes ? wrote : read, now = writes ? now_wrote : now_read;
  const Stamps other = writes ? other_wrote : other_read;
  const Stamps merged = (all_mine & (before | ~kStrong)) | (other & kSeveral);
  const Stamps after = (now & merged) | (~now & all_mine);
  std::memcpy(writes ? writers : readers, &after, sizeof after);
  if (!writes && any_unset)
    load_unset(warp, instruction, lane, bytes, [&](int b) { return writers[b] & kUnset; });
  if (writes && warp.undefined.by == &instruction)
    for (int b = 0; b < bytes; ++b)
      if (stores_unset(warp, instruction, lane, b)) writers[b] |= kUnset;
}

template <int bytes>
void shadow_lanes(Warp& warp, const Instruction& instruction, const uint64_t* offsets, Mask mask,
                  Access kind) {
  const uint32_t mine = stamp(warp, kind);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    shadow_lane<bytes>(warp, instruction, offsets[lane], lane, kind, mine);
  }
}

// Shadows of blocks that have finished; a launch needs a few and starts many blocks.
std::vector<std::shared_ptr<SharedShadow>> spare_shadows;

}  // namespace

void shadow_shared(Warp& warp, const Instruction& instruction, const uint64_t* offsets, Mask mask,
                   uint32_t bytes, Access kind) {
  const auto run = bytes == 1   ? shadow_lanes<1>
                   : bytes == 2 ? shadow_lanes<2>
                   : bytes == 4 ? shadow_lanes<4>
                   : bytes == 8 ? shadow_lanes<8>
                                : shadow_lanes<16>;
  run(warp, instruction, offsets, mask, kind);
}

void shadow_local(Warp& warp, const Instruction& instruction, uint64_t offset, int lane,
                  uint32_t bytes, Access kind) {
  uint8_t* written = warp.block->shadow->local_written.data() + offset;
  if (is_read(kind) && std::find(written, written + bytes, 0) != written + bytes)
    load_unset(warp, instruction, lane, static_cast<int>(bytes),
               [&](int b) { return !written[b]; });
  if (!is_read(kind))
    for (uint32_t b = 0; b < bytes; ++b) written[b] = !stores_unset(warp, instruction, lane, b);
}

void copy_issued(Warp& warp, const Instruction& instruction, const AsyncCopy& copy) {
  uint64_t offsets[kLanes];
  offsets[copy.lane] = copy.destination;
  shadow_shared(warp, instruction, offsets, Mask{1} << copy.lane, copy.bytes, Access::write);
  uint32_t* writers = warp.block->shadow->writers.data() + copy.destination;
  for (int b = 0; b < copy.bytes; ++b) writers[b] |= kCopying;
}

void copy_landed(Warp& warp, const AsyncCopy& copy) {
  uint32_t* writers = warp.block->shadow->writers.data() + copy.destination;
  std::fill_n(writers, copy.bytes, stamp(warp, Access::write));
}

namespace {

// Reductions come from other blocks.
void reduction_issued(Warp& warp, const Instruction& instruction, int lane, Block& target,
                      uint32_t offset, uint32_t bytes) {
  SharedShadow& shadow = *target.shadow;
  shadow.reductions.resize(target.shared_bytes);
  for (uint32_t b = offset; b < offset + bytes; ++b) {
    uint32_t& writer = shadow.writers[b];
    if (writer & kUnset || (writer & kCopying && !shadow.reductions[b]))
      explain(warp, instruction, b, lane, 1, kSettled, true, true, &writer, &shadow.readers[b]);
    writer = stamp(warp, Access::write) | kCopying | kStrong;
    ++shadow.reductions[b];
  }
}

}  // namespace

void bulk_issued(Warp& warp, const Instruction& instruction, int lane, Block& target,
                 uint32_t offset, uint32_t bytes, bool reduces) {
  if (!target.shadow) return;
  if (reduces) return reduction_issued(warp, instruction, lane, target, offset, bytes);
  const bool own = &target == warp.block;
  uint32_t* writers = target.shadow->writers.data();
  for (uint32_t at = offset, size = 0; at < offset + bytes; at += size) {
    size = at % 16 == 0 && at + 16 <= offset + bytes ? 16 : 1;
    uint64_t offsets[kLanes];
    offsets[lane] = at;
    if (own) shadow_shared(warp, instruction, offsets, Mask{1} << lane, size, Access::write);
    for (uint32_t b = at; b < at + size; ++b) {
      if (!own && writers[b] & kCopying)
        explain(warp, instruction, b, lane, 1, kSettled, true, false, writers + b,
                target.shadow->readers.data() + b);
      writers[b] = stamp(warp, Access::write) | kCopying | kStrong;
    }
  }
}

void bulk_landed(Block& target, uint32_t offset, uint32_t bytes, bool reduces) {
  if (!target.shadow) return;
  SharedShadow& shadow = *target.shadow;
  for (uint32_t b = offset; b < offset + bytes; ++b)
    if (!reduces || --shadow.reductions[b] == 0) shadow.writers[b] = kSettled;
}

void bulk_read(Warp& warp, const Instruction& instruction, int lane, uint64_t offset,
               uint32_t bytes) {
  if (!warp.block->shadow) return;
  const uint32_t mine = stamp(warp, Access::read);
  const uint32_t* writers = warp.block->shadow->writers.data() + offset;
  const uint32_t* readers = warp.block->shadow->readers.data() + offset;
  for (uint32_t b = 0; b < bytes; ++b)
    if (writers[b] & (kCopying | kUnset) || conflict(writers[b], mine))
      return explain(warp, instruction, offset + b, lane, 1, mine, false, true, writers + b,
                     readers + b);
}

void shadow_remote(Warp& warp, const Instruction& instruction, Block& target, uint64_t offset,
                   int lane, uint32_t bytes, Access kind) {
  uint32_t* writers = target.shadow->writers.data() + offset;
  const uint32_t* readers = target.shadow->readers.data() + offset;
  const bool writes = !is_read(kind), reads_now = kind == Access::atomic;
  for (uint32_t b = 0; b < bytes; ++b)
    if (writers[b] & kCopying || (reads_now && writers[b] & kUnset))
      return explain(warp, instruction, offset, lane, bytes, kSettled, writes, reads_now, writers,
                     readers);
  if (writes) {
    for (uint32_t b = 0; b < bytes; ++b)
      writers[b] = kSettled | (stores_unset(warp, instruction, lane, b) ? kUnset : 0);
  } else if (std::any_of(writers, writers + bytes, [](uint32_t w) { return w & kUnset; })) {
    load_unset(warp, instruction, lane, static_cast<int>(bytes),
               [&](int b) { return writers[b] & kUnset; });
  }
}

void fence_executed(Warp& warp) {
  if (warp.block->shadow) ++warp.block->epoch;
}

void block_started(Block& block) {
  if (!options.check) return;
  const Kernel& kernel = *block.kernel;
  if (spare_shadows.empty()) {
    block.shadow = std::make_shared<SharedShadow>();
  } else {
    block.shadow = std::move(spare_shadows.back());
    spare_shadows.pop_back();
  }
  block.shadow->writers.assign(block.shared_bytes, kUnset);
  block.shadow->readers.assign(block.shared_bytes, 0);
  block.shadow->reductions.clear();
  block.shadow->local_written.assign(size_t{kernel.local_bytes} * block.warps.size() * kLanes, 0);
  for (Warp& warp : block.warps) {
    warp.defined.assign(kernel.file_bytes / kUnit + 1, 0);
    warp.origins.assign(warp.defined.size(), nullptr);
    warp.undefined = {};
    for (const auto& constant : kernel.constants) warp.defined[constant.slot / kUnit] = kFullMask;
    for (const auto& special : kernel.specials) warp.defined[special.slot / kUnit] = kFullMask;
  }
}

void block_finished(Block& block) {
  if (block.shadow) spare_shadows.push_back(std::move(block.shadow));
}

// Any barrier ends the epoch, also one of some of the warps: what those that stayed away did before
// it is forgotten, which can hide a race but never invents one.
void barrier_released(Block& block) { ++block.epoch; }

}  // namespace ptxvm
