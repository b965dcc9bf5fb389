// Checks shared by the operators on tokens.
#pragma once
#include <algorithm>

#include "core/qkv.h"
#include "core/written.h"

namespace tokenmill {

inline void check_token_rows(const char* op, const char* name, const View& t) {
  check_last_contiguous(op, name, t);
  const int64_t tokens = t.size(0) * t.size(1);
  check(tokens < int64_t{1} << 31, op, name, "must have fewer than 2^31 tokens in all", tokens);
}

// Tokens [B, N, C] for arithmetic.
inline void check_tokens(const char* op, const char* name, const View& t) {
  check(t.dim() == 3, op, name, "must have 3 dimensions [B, N, C]", t.dim());
  check_dtype(op, name, t);
  check_token_rows(op, name, t);
}

constexpr const char* kMovable = "must be float16, bfloat16, float32, int32 or int64";
inline bool is_movable(const View& t) {
  return has_kernel_dtype(t) || t.dtype == ScalarType::Int || t.dtype == ScalarType::Long;
}

// Tokens [B, N, C] that are only moved.
inline void check_movable_tokens(const char* op, const char* name, const View& t) {
  check(t.dim() == 3, op, name, "must have 3 dimensions [B, N, C]", t.dim());
  check(is_movable(t), op, name, kMovable, t.dtype);
  check_token_rows(op, name, t);
}

inline void check_like(const char* op, const char* name, const View& t,
                       const std::vector<int64_t>& shape, ScalarType dtype, const char* other,
                       const View& first) {
  check(t.sizes == shape, op, name, Rule("must have shape ", shape), t.sizes);
  check(t.dtype == dtype, op, name, Rule("must be ", dtype), t.dtype);
  check_last_contiguous(op, name, t);
  check_device_of(op, name, t, other, first);
}

// [B, K] int32.
inline void check_indices(const char* op, const char* name, const View& t, int64_t batch,
                          const char* other, const View& first) {
  check(t.dim() == 2 && t.size(0) == batch, op, name, Rule("must have shape [", batch, ", K]"),
        t.sizes);
  check(t.dtype == ScalarType::Int, op, name, "must be int32", t.dtype);
  check_last_contiguous(op, name, t);
  check_device_of(op, name, t, other, first);
}

// CPU only: each index is between `least` (-1: no row, 0: a row) and tokens - 1, and no token
// occurs twice within a row unless repeats are allowed.
inline void check_index_values(const char* op, const char* name, const View& t, int64_t tokens,
                               int64_t minimum = -1, bool repeats = true) {
  const int64_t rows = t.dim() == 2 ? t.size(0) : 1, entries = t.size(-1);
  const int64_t step = t.dim() == 2 ? t.step(0) : 0;
  const int32_t* ids = t.data<int32_t>();
  const auto good = [&](int32_t id) { return id >= minimum && id < tokens; };
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t *begin = ids + r * step, *end = begin + entries;
    const int32_t* bad = std::find_if_not(begin, end, good);
    if (bad != end)
      fail(op, name, Rule("must be ", minimum, " to ", tokens - 1).text(), show(int64_t{*bad}));
  }
  if (repeats) return;
  std::vector<int32_t> ordered(entries);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy(ids + r * step, ids + r * step + entries, ordered.begin());
    std::sort(ordered.begin(), ordered.end());
    const auto after = std::upper_bound(ordered.begin(), ordered.end(), -1);
    const auto twice = std::adjacent_find(after, ordered.end());
    check(twice == ordered.end(), op, name, "must not name a token twice",
          int64_t{twice == ordered.end() ? 0 : *twice});
  }
}

}  // namespace tokenmill
