// What happens beside the warps: bulk copies and what they signal. A transfer takes effect at a
// moment between its issue and the wait that orders it, which Options::async chooses; a kernel
// without races cannot tell the moments apart.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "ptxvm/clocks.h"
#include "ptxvm/machine.h"
#include "ptxvm/random.h"

namespace ptxvm {

// What a sleeping group waits for: the mbarrier at an offset of shared memory of its block, or ...
// (kWarpgroup: a wgmma that others of its warpgroup have not issued)
constexpr uint32_t kClusterBarrier = 0xffffffff, kRegisters = 0xfffffffe, kWarpgroup = 0xfffffffd;

// A bulk copy between its issue and its end. Its addresses have been checked.
struct Transfer {
  enum class Combine : uint8_t { copy, add, min, max, inc, dec, bit_and, bit_or, bit_xor };
  enum class Element : uint8_t { b8, u32, s32, u64, s64, f16, bf16, f32, tf32, f64 };
  struct Piece {
    uint64_t to;    // offset in shared memory of each target, else a host address
    uint64_t from;  // host address; 0: there is nothing, so that it is filled
    uint32_t bytes;
  };
  struct Target {  // of a copy into shared memory, with the mbarrier that gets the bytes
    Block* block;
    uint32_t mbarrier;
    uint32_t segment = 0;  // check mode: the copy's accesses, for those that see its mbarrier
  };
  Warp* warp = nullptr;
  const Instruction* from = nullptr;
  int lane = 0;
  std::vector<Piece> pieces;
  bool to_global = false;
  std::vector<Target> targets;  // of what goes into shared memory
  uint32_t bytes = 0;           // that the mbarriers get
  uint32_t group = 0;           // bulk group of the thread, where it completes by one
  bool fill_nan = false;
  Combine combine = Combine::copy;
  Element element = Element::b8;
  std::vector<char> data;  // once the source has been read
  // Instead of a copy: an arrival at targets[0] when the first `group` copies of cp.async of the
  // lane have landed.
  bool arrives = false;
};

// Blocks that run together, one by default, and what is shared among them.
struct Cluster {
  std::vector<Block*> blocks;  // by rank
  uint32_t number = 0;         // in the grid
  std::shared_ptr<ClusterClocks> clocks;
  uint32_t shape[3] = {1, 1, 1};
  uint32_t unfinished = 0;  // blocks
  std::deque<Transfer> transfers;
  Random random{0};
  // barrier.cluster: threads that arrived, and the phase, of which one bit counts.
  uint32_t arrived = 0, phase = 0;
  // Turns in a row in which no block of the cluster ran an instruction. Since the last event
  // (arrivals, exits, transfers) on which anything could depend: how often waits were cut short,
  // and instructions of its blocks; and instructions since waits were cut short last.
  uint32_t stalled = 0, impatience = 0;
  uint64_t quiet = 0, worked = 0;
};

// Issues a transfer: its source and destination must not be touched from now on.
void start_transfer(Warp&, Transfer);
// Lets transfers take effect: all of a lane but those of its last `keep` bulk groups, or only read
// their sources; one that an mbarrier waits for, the oldest; some at random, at the moments that
// instructions of the asynchronous kind give, if Options::async says so.
void finish_groups(Warp&, Mask, uint32_t keep, bool reads_only);
bool land_oldest(Cluster&);
void land_some(Warp&);
// What is left when a block and all blocks of its cluster have finished.
void finish_transfers(Block&);
void finish_transfers(Cluster&);

// Groups that wait for something look again. An event is what may end a wait.
void wake(Block&, uint32_t what);
void happened(Block&);

// The lanes of a wait that is not over: they sleep, or go on without it if their time is up.
Mask sleep_unless_timed_out(Warp&, Mask, uint32_t what);

// ops_mbarrier.cpp: of the mbarrier at an offset of the block. Transferred bytes arrive; pending
// arrivals go down by one; its state in words.
void complete_bytes(Warp&, const Instruction&, int lane, Block&, uint32_t offset, uint32_t bytes);
void arrive_at(Warp&, const Instruction&, int lane, Block&, uint32_t offset);
std::string describe_mbarrier(const Block&, uint32_t offset);

// ops_wgmma.cpp: what the warps of a warpgroup do alike and in one order, wgmma and setmaxnreg,
// with two values. A fault for a warp that does otherwise, or when all have exited and some did
// not.
void do_alike(Warp&, const Instruction&, uint64_t a, uint64_t b);
void require_alike(Warp& exited);

// ops_copy.cpp: lands the copies of cp.async of a lane that have a number below `end`, for those
// that know of the segment.
void land_copies(Warp&, int lane, uint32_t end, uint32_t segment);

// ops_cluster.cpp: threads that exit are not waited for at barrier.cluster, nor counted.
void leave_cluster_barrier(Warp&, Mask exiting);
void complete_cluster_barrier(Block&);

}  // namespace ptxvm
