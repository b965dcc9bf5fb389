// Checks of a decode step's requests.
#pragma once
#include <algorithm>

#include "core/qkv.h"
#include "linear/requests.h"

namespace tokenmill {

// int32 [batch].
inline const int32_t* request_numbers(const char* op, const char* name, const View& t,
                                      int64_t batch, const char* input_name, const View& input) {
  check(t.dtype == ScalarType::Int, op, name, "must be int32", t.dtype);
  const std::vector<int64_t> wanted{batch};
  check(t.sizes == wanted, op, name, Rule("must have shape ", wanted), t.sizes);
  check_last_contiguous(op, name, t);
  check_device_of(op, name, t, input_name, input);
  return t.data<int32_t>();
}

// a: the record of a call with state, state_indices and accepted.
template <typename Args>
Requests requests_of(const char* op, const Args& a, int64_t batch, const char* input_name,
                     const View& input) {
  Requests r{a.state.size(0), nullptr, nullptr};
  if (a.state_indices)
    r.indices = request_numbers(op, "state_indices", a.state_indices, batch, input_name, input);
  else
    check(r.slots >= batch, op, "state",
          Rule("must have a slot for each sequence, ", batch, ", without state_indices"), r.slots);
  if (a.accepted)
    r.accepted = request_numbers(op, "accepted", a.accepted, batch, input_name, input);
  return r;
}

// Values, which a GPU does not check.
inline void check_request_values(const char* op, const Requests& r, int64_t batch, int64_t seqlen) {
  for (int64_t b = 0; r.accepted && b < batch; ++b) {
    const int64_t count = r.accepted[b];
    check(count >= 0 && count <= seqlen, op, "accepted",
          Rule("must be 0 to the number of tokens, ", seqlen), count);
  }
  if (!r.indices) return;
  const std::vector<int64_t> found(r.indices, r.indices + batch);
  for (const int64_t i : found)
    check(i >= -1 && i < r.slots, op, "state_indices",
          Rule("must be -1 (skip) or a slot below ", r.slots), i);
  std::vector<int64_t> used = found;
  std::sort(used.begin(), used.end());
  const auto begin = std::lower_bound(used.begin(), used.end(), 0);
  check(std::adjacent_find(begin, used.end()) == used.end(), op, "state_indices",
        "must not repeat a slot", found);
}

}  // namespace tokenmill
