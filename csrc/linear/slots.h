// Checks of the slots of a decode step's states.
#pragma once
#include <algorithm>

#include "core/qkv.h"

namespace tokenmill {

// Slots of states, one for each request of a batch; null without them.
inline const int32_t* slots_of(const char* op, const View& indices, const View& state,
                               int64_t batch, const char* input_name, const View& input) {
  if (!indices) {
    check(state.size(0) >= batch, op, "state",
          Rule("must have a slot for each sequence, ", batch, ", without state_indices"),
          state.size(0));
    return nullptr;
  }
  check(indices.dtype == ScalarType::Int, op, "state_indices", "must be int32", indices.dtype);
  const std::vector<int64_t> wanted{batch};
  check(indices.sizes == wanted, op, "state_indices", Rule("must have shape ", wanted),
        indices.sizes);
  check_last_contiguous(op, "state_indices", indices);
  check_device_of(op, "state_indices", indices, input_name, input);
  return indices.data<int32_t>();
}

inline void check_slot_values(const char* op, const View& indices, int64_t slots) {
  const int32_t* first = indices.data<int32_t>();
  std::vector<int64_t> found(first, first + indices.size(0));
  for (const int64_t i : found)
    check(i >= -1 && i < slots, op, "state_indices",
          Rule("must be -1 (skip) or a slot below ", slots), i);
  std::vector<int64_t> used = found;
  std::sort(used.begin(), used.end());
  const auto begin = std::lower_bound(used.begin(), used.end(), 0);
  check(std::adjacent_find(begin, used.end()) == used.end(), op, "state_indices",
        "must not repeat a slot", found);
}

}  // namespace tokenmill
