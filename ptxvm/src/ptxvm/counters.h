// Exact counts of a launch: instructions by class, tensor-core work, requests to shared and global
// memory. Definitions in docs/guide.md, "Counters". Everything here requires Options.count.
#pragma once
#include <string>
#include <string_view>

#include "ptxvm/machine.h"

namespace ptxvm {

// Called around a launch. The scheduler adds to kernel.issued and kernel.active between the two.
void start_counting(Kernel&);
void finish_counting(const Kernel&, const uint32_t grid[3], const uint32_t block[3],
                     uint32_t dynamic_shared, bool complete);

// One object per launch since the last reset, in order, as {"launches": [...]}.
std::string counters_json();
const std::string& last_launch();  // the last of these objects
void reset_counters();

// "ld.global.v4.b32" of an instruction's text, which may begin with a guard.
std::string_view opcode_of(const Instruction&);

}  // namespace ptxvm
