#pragma once
#include "ptxvm/machine.h"

namespace ptxvm {

// Sets the special registers that a kernel reads, once per block.
void set_specials(Warp&);
// Clocks advance with each turn of a warp: one tick per instruction that the machine has issued.
void set_clocks(Warp&, uint64_t time);

}  // namespace ptxvm
