// The kernel of a table that runs a call on the current device.
#pragma once
#include <algorithm>

#include "core/kernels.h"

namespace tokenmill::cuda {

// Compute capability of the current device: 90 for sm_90. Throws: no kernel can be chosen without
// it.
int compute_capability();

// Whether the current device runs the row for a call; an sm_80 row needs no device query.
template <typename Call>
bool runs(const Kernel<Call>& row, const Call& call) {
  return row.launch && takes(row, call) &&
         (row.chips.first == kFromSm80.first || row.chips.contain(compute_capability()));
}

// Workspace that suffices for each kernel that takes the call, switched on or not: another thread
// may set knobs before the launch.
template <typename Call>
int64_t workspace_of(std::span<const Kernel<Call>> table, const Call& call) {
  int64_t bytes = 0;
  for (const Kernel<Call>& row : table)
    if (row.workspace && runs(row, call)) bytes = std::max(bytes, row.workspace(call));
  return bytes;
}

// Launches the first kernel that takes the call. The last row of a table takes every call.
template <typename Call>
const char* launch_first(std::span<const Kernel<Call>> table, const Call& call, void* stream) {
  const char* error = kNotMapped;
  for (const Kernel<Call>& row : table) {
    if ((!row.on || knob(*row.on)) && runs(row, call)) error = row.launch(call, stream);
    if (error != kNotMapped) break;
  }
  return error;
}

}  // namespace tokenmill::cuda
