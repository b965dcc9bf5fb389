// Runs a grid: blocks take turns, so do the warps of a block and the lane groups of a warp.
#pragma once
#include "ptxvm/machine.h"

namespace ptxvm {

struct Launch {
  Kernel* kernel;
  uint32_t grid[3], block[3];
  uint32_t cluster[3];      // in blocks; the grid is a multiple of it
  uint32_t dynamic_shared;  // bytes
  const char* parameters;   // kernel->parameter_bytes bytes
  const void* workspace;    // barrier state of a cooperative launch, else null
};

// Runs all blocks of a decoded kernel. Throws Fault, after releasing everything of the launch.
void run_grid(const Launch&);

}  // namespace ptxvm
