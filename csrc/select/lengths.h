// Lengths of requests, int32 [B], as the operators of `select` take them: the checks of
// python/tokenmill/select/column_scores.py, in its words.
#pragma once
#include "core/qkv.h"

namespace tokenmill {

inline const int32_t* check_lengths(const char* op, const char* name, const OptTensor& tensor,
                                    const View& q) {
  if (!tensor) return nullptr;
  const View t(*tensor);
  const std::vector<int64_t> wanted{q.size(0)};
  check(t.sizes == wanted, op, name, Rule("must have shape ", wanted), t.sizes);
  check(t.dtype == ScalarType::Int, op, name, "must be int32", t.dtype);
  check_last_contiguous(op, name, t);
  check_device_of_q(op, name, t, q);
  return t.data<int32_t>();
}

inline void check_length_values(const char* op, const char* name, const int32_t* lengths,
                                int64_t batch, int64_t longest) {
  for (int64_t b = 0; lengths && b < batch; ++b)
    check(lengths[b] >= 0 && lengths[b] <= longest, op, name, Rule("must be 0 to ", longest),
          int64_t{lengths[b]});
}

}  // namespace tokenmill
