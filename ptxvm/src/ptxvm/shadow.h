// Check mode's shadow of memory: last writer and readers, and which bytes of a block's shared and
// local memory hold values. Only memory_map.cpp, check.cpp, clocks.cpp, shadow.cpp and
// synchronise.cpp use it; all other files go through check.h.
#pragma once
#include <algorithm>
#include <array>
#include <unordered_map>
#include <vector>

#include "ptxvm/check.h"
#include "ptxvm/clocks.h"

namespace ptxvm {

// wrote: the segment of the last write to the cell or, for a strong write, a set that includes
// earlier writes with which a later access may still race. read: the segment or set that has read
// the cell since (clocks.h). write_info, read_info: number (check.cpp) of the last instruction, its
// lane, and flag bits.
struct Cell {
  uint32_t wrote = 0, write_info = 0, read = 0, read_info = 0;
};
constexpr uint32_t kNumberBits = 18, kNumberMask = (1u << kNumberBits) - 1;
// The lane of the last write or read, or several lanes: readers, or writers of the same.
constexpr uint32_t kLaneShift = kNumberBits, kLaneMask = 63, kFlagShift = kLaneShift + 6;
constexpr uint32_t kStrongWrite = 1u << 24;  // the cell may hold a flag
constexpr uint32_t kCopying = 2u << 24;      // cp.async in flight
constexpr uint32_t kBulk = 4u << 24;         // bulk copy in flight
constexpr uint32_t kReducing = 8u << 24;     // bulk reductions in flight
constexpr uint32_t kWriterShift = 28;        // lowest bits of the last writer's number
constexpr uint32_t kInFlight = kCopying | kBulk | kReducing;

// Cells of an aligned range. Accesses are aligned to their size, and a cell is as small as the
// smallest access, at most 16 bytes: an access covers whole cells.
struct Region {
  static constexpr uint32_t kShift = 10, kBytes = 1u << kShift;
  std::vector<Cell> cells;  // empty before the first access
  uint32_t shift = 4;

  Cell* at(uint64_t place, uint32_t bytes) {
    if (cells.empty() || bytes < 1u << shift) [[unlikely]]
      refine(bytes);
    return cells.data() + ((place & (kBytes - 1)) >> shift);
  }
  void refine(uint32_t bytes);
};

// Last access to this block by a warp of another block; it is complete once its time is known.
struct Remote {
  uint32_t agent, time;
  Warp* warp;
  const Instruction* in;
  int lane;
};

// B of a wgmma that a warp has read for the segment, and its writers: the other warps of the
// warpgroup read the same cells.
struct ReadOperand {
  static constexpr uint32_t kMostWriters = 6;
  const Instruction* by = nullptr;
  uint64_t b = 0;
  uint32_t segment = 0, writes = 0;  // SharedShadow::writes
  uint32_t count = 0;
  std::array<uint32_t, kMostWriters> writers{};

  // False if there is no room left.
  bool add_writer(uint32_t id) {
    const auto end = writers.begin() + count;
    if (std::find(writers.begin(), end, id) != end) return true;
    if (count == kMostWriters) return false;
    writers[count++] = id;
    return true;
  }
};

struct SharedShadow {
  const Kernel* kernel = nullptr;
  std::vector<Region> regions;
  std::vector<uint16_t> unset;         // per 16 bytes: one bit for each byte without a value
  std::vector<uint16_t> reductions;    // per 16 bytes: bulk reductions in flight; empty at first
  std::vector<uint8_t> local_written;  // per byte of the local memory of all threads
  std::unordered_map<uint32_t, Signal> signals;  // by the offset of the mbarrier
  std::array<Gathered, 16> barriers;
  std::vector<Remote> remote;
  uint32_t writes = 0;  // version: counts changes of writers and of copies in flight
  std::array<ReadOperand, 32> operands;

  // Entry of a B, by its descriptor: another warpgroup that reads the same B replaces it.
  ReadOperand& operand(uint64_t b) { return operands[b / 2 % operands.size()]; }

  uint32_t unset_in(uint64_t offset, uint32_t bytes) const {
    return unset[offset / 16] >> offset % 16 & ((1u << bytes) - 1);
  }
};

// In-bounds accesses of the lanes in the mask: to shared memory of a block, to global memory.
void shadow_shared(Warp&, const Instruction&, Block&, const uint64_t* offsets, Mask, uint32_t bytes,
                   Access);
void shadow_global(Warp&, const Instruction&, const uint64_t* addresses, Mask, uint32_t bytes,
                   Access);
// An access to shared memory of another block, which must happen before that block ends.
void reached(Warp&, const Instruction&, int lane, Block&);
void shadow_local(Warp&, const Instruction&, uint64_t offset, int lane, uint32_t bytes, Access);

// Called before the shadow of global memory grows without bounds, or numbers wrap around.
void forget_global_shadow();
void shadow_launched();

// True if the host registered the memory as read-only.
bool is_constant(uint64_t address, uint32_t bytes);

}  // namespace ptxvm
