// What check mode knows of each byte of a block's shared and local memory. Only memory_map.cpp and
// check.cpp see it; everybody else goes through check.h.
#pragma once
#include "ptxvm/check.h"

namespace ptxvm {

struct SharedShadow {
  // Per byte of shared memory, who wrote and read it last: a stamp as of check.cpp.
  std::vector<uint32_t> writers, readers;
  // Bulk reductions in flight into each byte; empty before the first.
  std::vector<uint16_t> reductions;
  std::vector<uint8_t> local_written;  // per byte of the local memory of all threads
};

// Accesses within bounds, of the lanes in the mask and of one lane.
void shadow_shared(Warp&, const Instruction&, const uint64_t* offsets, Mask, uint32_t bytes,
                   Access);
// Of another block: values alone, for the warps of two blocks have no order that epochs show.
void shadow_remote(Warp&, const Instruction&, Block&, uint64_t offset, int lane, uint32_t bytes,
                   Access);
void shadow_local(Warp&, const Instruction&, uint64_t offset, int lane, uint32_t bytes, Access);

}  // namespace ptxvm
