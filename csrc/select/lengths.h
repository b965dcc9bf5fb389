// Values of lengths, as python/tokenmill/select/column_scores.py checks them, in its words.
#pragma once
#include "select/checks.h"

namespace tokenmill {

inline void check_length_values(const char* op, const char* name, const int32_t* lengths,
                                int64_t batch, int64_t longest) {
  for (int64_t b = 0; lengths && b < batch; ++b)
    check(lengths[b] >= 0 && lengths[b] <= longest, op, name, Rule("must be 0 to ", longest),
          int64_t{lengths[b]});
}

}  // namespace tokenmill
