// The lanes of one warp: groups that stand at different instructions, converging and barriers.
#pragma once
#include <array>
#include <string>

#include "ptxvm/control.h"
#include "ptxvm/machine.h"

namespace ptxvm {

constexpr int kBarriers = 16;  // per block

// A block that runs, with what the scheduler keeps of it.
struct Resident {
  Block block;
  std::shared_ptr<Cluster> cluster;
  std::array<Barrier, kBarriers> barriers;
  uint32_t unfinished = 0;  // warps
  std::unique_ptr<char[]> files, shared, local;
};

// Runs a warp until its fuel is used up or all its lanes wait or have exited; returns the number of
// instructions issued. The group with the lowest program counter runs, so that lanes meet again
// behind a branch; one that used up a stint of options.fuel instructions gives way to the next
// higher, so that none starves.
uint64_t run_warp(Resident&, Warp&, Kernel&, uint64_t fuel);

// Registers per lane before setmaxnreg: of the machine code, or what a compiler may use at most.
uint32_t registers_at_start(const Kernel&, uint32_t warps);

// Where the lanes of the warp stand and what they wait for, a line per group.
std::string describe(const Warp&);

}  // namespace ptxvm
