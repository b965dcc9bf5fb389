// Execution of one warp: groups of lanes at different instructions, reconvergence and barriers.
#pragma once
#include <array>
#include <string>

#include "ptxvm/control.h"
#include "ptxvm/machine.h"

namespace ptxvm {

constexpr int kBarriers = 16;  // per block

// A running block with the scheduler's state for it.
struct Resident {
  Block block;
  std::shared_ptr<Cluster> cluster;
  std::array<Barrier, kBarriers> barriers;
  uint32_t unfinished = 0;  // warps that have not finished
  bool finished = false;
  uint32_t sleeper = 0;  // order=sleepy: the warp that sleeps
  uint64_t slept = 0;    // instructions of the others since it fell asleep
  std::unique_ptr<char[]> files, shared, local;
};

// Runs a warp until its fuel is used up or all its lanes wait or have exited; returns the number of
// instructions issued. The group with the lowest program counter runs, so that lanes reconverge
// after a branch; a group that has used a stint of options.fuel instructions yields to the next
// higher one, so that none starves.
uint64_t run_warp(Resident&, Warp&, Kernel&, uint64_t fuel);

// Registers per lane before setmaxnreg: from the machine code, or the compiler's maximum.
uint32_t registers_at_start(const Kernel&, uint32_t warps);

// waits.cpp. "block (0, 1, 0)" and, in the lines after it, where its lanes stand and what they wait
// for; the instruction at which the first of them wait for a barrier, or where they stand.
std::string describe(const Resident&);
const Instruction* waiting_instruction(const Block&);

}  // namespace ptxvm
