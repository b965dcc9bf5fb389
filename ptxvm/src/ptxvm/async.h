// Asynchronous work of a cluster: bulk copies and what they signal. A transfer takes effect at a
// moment between its issue and the wait that orders it; Options::async chooses the moment. A kernel
// without races cannot tell the moments apart.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "ptxvm/clocks.h"
#include "ptxvm/machine.h"
#include "ptxvm/random.h"

namespace ptxvm {

// Condition that a sleeping group waits for: the shared-memory offset of an mbarrier of its block,
// or one of these. kWarpgroup: a wgmma that other warps of the warpgroup have not issued yet.
constexpr uint32_t kClusterBarrier = 0xffffffff, kRegisters = 0xfffffffe, kWarpgroup = 0xfffffffd;

// A bulk copy between its issue and its end. Its addresses have been checked.
struct Transfer {
  enum class Combine : uint8_t { copy, add, min, max, inc, dec, bit_and, bit_or, bit_xor };
  enum class Element : uint8_t { b8, u32, s32, u64, s64, f16, bf16, f32, tf32, f64 };
  struct Piece {
    uint64_t to;    // offset in the shared memory of each target, else a host address
    uint64_t from;  // host address; 0: no source, the destination is filled
    uint32_t bytes;
  };
  struct Target {  // of a copy into shared memory, with the mbarrier that it signals
    Block* block;
    uint32_t mbarrier;
    uint32_t segment = 0;  // check mode: the copy's accesses, as ordered by its mbarrier
  };
  Warp* warp = nullptr;
  const Instruction* from = nullptr;
  int lane = 0;
  std::vector<Piece> pieces;
  bool to_global = false;
  std::vector<Target> targets;  // for copies into shared memory
  uint32_t bytes = 0;           // transaction bytes that complete on each mbarrier
  uint32_t group = 0;           // bulk group of the thread, for copies that complete by bulk group
  bool fill_nan = false;
  Combine combine = Combine::copy;
  Element element = Element::b8;
  std::vector<char> data;  // contents of the source, once it has been read
  // Not a copy: an arrival at targets[0], once the first `group` cp.async copies of the lane have
  // landed.
  bool arrives = false;
};

// A cluster: blocks that run together (one by default) and the state they share.
struct Cluster {
  std::vector<Block*> blocks;  // indexed by rank
  uint32_t number = 0;         // index in the grid
  std::shared_ptr<ClusterClocks> clocks;
  uint32_t shape[3] = {1, 1, 1};
  uint32_t unfinished = 0;  // blocks that have not finished
  std::deque<Transfer> transfers;
  Random random{0};
  // barrier.cluster: number of threads that arrived, and the phase, of which only the lowest bit
  // matters.
  uint32_t arrived = 0, phase = 0;
  // stalled: consecutive turns in which no block of the cluster ran an instruction. Since the last
  // event (arrival, exit, transfer) on which anything could depend: impatience counts waits that
  // were cut short, quiet the instructions of the cluster's blocks. worked: instructions since the
  // last wait was cut short.
  uint32_t stalled = 0, impatience = 0;
  uint64_t quiet = 0, worked = 0;
};

// Issues a transfer: its source and destination must not be touched from now on.
void start_transfer(Warp&, Transfer);
// Transfers take effect: all of a lane except its last `keep` bulk groups (or only their reads);
// the oldest one that an mbarrier waits for; random ones, at each instruction of the asynchronous
// kind, if Options::async is seeded.
void finish_groups(Warp&, Mask, uint32_t keep, bool reads_only);
bool land_oldest(Cluster&);
void land_some(Warp&);
// Transfers that are left when a block, or all blocks of its cluster, have finished.
void finish_transfers(Block&);
void finish_transfers(Cluster&);

// Wakes groups to check their condition again. An event is anything that may end a wait.
void wake(Block&, uint32_t what);
void happened(Block&);

// Lanes whose wait is not over: they sleep, or continue without it if their time is up.
Mask sleep_unless_timed_out(Warp&, Mask, uint32_t what);

// ops_mbarrier.cpp. The mbarrier at an offset of the block: transferred bytes arrive; pending
// arrivals decrease by one; its state in words.
void complete_bytes(Warp&, const Instruction&, int lane, Block&, uint32_t offset, uint32_t bytes);
void arrive_at(Warp&, const Instruction&, int lane, Block&, uint32_t offset);
std::string describe_mbarrier(const Block&, uint32_t offset);

// ops_wgmma.cpp. wgmma and setmaxnreg must be executed by all warps of a warpgroup in the same
// order, with equal values a and b. Faults for a warp that deviates, or when all warps have exited
// and some did not execute it.
void do_alike(Warp&, const Instruction&, uint64_t a, uint64_t b);
void require_alike(Warp& exited);

// ops_copy.cpp. Lands the cp.async copies of a lane with a number below `end`, which have arrived
// at an mbarrier.
void land_copies(Warp&, int lane, uint32_t end);

// ops_cluster.cpp. Exiting threads no longer count at barrier.cluster.
void leave_cluster_barrier(Warp&, Mask exiting);
void complete_cluster_barrier(Block&);

}  // namespace ptxvm
