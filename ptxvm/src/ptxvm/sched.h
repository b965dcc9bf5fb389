// Runs a grid: blocks in turns, their warps in turns, and the groups of lanes of a warp.
#pragma once
#include "ptxvm/machine.h"

namespace ptxvm {

struct Launch {
  Kernel* kernel;
  uint32_t grid[3], block[3];
  uint32_t cluster[3];      // blocks, of which the grid has multiples
  uint32_t dynamic_shared;  // bytes
  const char* parameters;   // kernel->parameter_bytes bytes
  const void* workspace;    // where the blocks of a cooperative launch meet, else null
};

// Runs all blocks of a decoded kernel. Throws Fault; nothing of the launch is left then.
void run_grid(const Launch&);

}  // namespace ptxvm
