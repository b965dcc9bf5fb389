// Checks shared by operators on queries, keys and values: the ones of python/tokenmill/_check.py,
// in its order and words.
#pragma once
#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/door.h"
#include "core/rows.h"

namespace tokenmill {

constexpr int64_t kMaxHeadDim = 256;

// Scale of q.k of a call: 1/sqrt(D) by default.
template <typename Args>
double scale_of(const Args& a) {
  if (a.scale) return *a.scale;
  const double dim = a.q.dim() > 0 ? static_cast<double>(a.q.size(-1)) : 1.0;
  return 1 / std::sqrt(std::max(dim, 1.0));
}

inline void check_device_of(const char* op, const char* name, const View& t, const char* other,
                            const View& first) {
  if (!same_device(t, first))
    fail(op, name,
         Rule("must be on the device of ", other, ", ", show_device(first).c_str()).text(),
         show_device(t));
}

inline void check_device_of_q(const char* op, const char* name, const View& t, const View& q) {
  check_device_of(op, name, t, "q", q);
}

// Scale of scores: times log2(e) it is finite in float32.
inline void check_scale(const char* op, double scale) {
  check(std::abs(scale) <= 0x1p127, op, "scale", "must be at most 2^127 in size", scale);
}

inline void check_last_contiguous(const char* op, const char* name, const View& t) {
  check(t.last_contiguous(), op, name, "must have a contiguous last dimension; strides", t.strides);
}

inline void check_head_dim(const char* op, const char* name, const View& t,
                           int64_t maximum = kMaxHeadDim) {
  check(t.size(-1) >= 1 && t.size(-1) <= maximum, op, name,
        Rule("must have a head dimension of 1 to ", maximum), t.size(-1));
}

// Max head dimensions: of q and k, and of v.
struct HeadDims {
  int64_t maximum = kMaxHeadDim, max_value = kMaxHeadDim;
};

// Checks rank (3: packed, 4: sequences, 5: maps), dtype, device, layout and shapes.
inline void check_qkv(const char* op, const View& q, const View& k, const View& v, int64_t rank,
                      HeadDims dims = {}) {
  const char* layout = rank == 3   ? "[T, H, D] (packed)"
                       : rank == 4 ? "[B, S, H, D]"
                                   : "[B, Y, X, H, D]";
  const std::pair<const char*, const View*> all[] = {{"q", &q}, {"k", &k}, {"v", &v}};
  for (auto [name, t] : all)
    check(t->dim() == rank, op, name, Rule("must have ", rank, " dimensions ", layout), t->dim());
  check_dtype(op, "q", q);
  for (auto [name, t] : {all[1], all[2]}) {
    check(t->dtype == q.dtype, op, name, Rule("must have the dtype of q, ", q.dtype), t->dtype);
    check_device_of_q(op, name, *t, q);
  }
  for (auto [name, t] : all) {
    check_last_contiguous(op, name, *t);
    check_head_dim(op, name, *t, t == &v ? dims.max_value : dims.maximum);
  }
  check(k.size(-1) == q.size(-1), op, "k", Rule("must have the head dimension of q, ", q.size(-1)),
        k.size(-1));
  if (rank > 3)
    check(k.size(0) == q.size(0), op, "k", Rule("must have the batch size of q, ", q.size(0)),
          k.size(0));
  check(std::equal(v.sizes.begin(), v.sizes.end() - 1, k.sizes.begin()), op, "v",
        Rule("must have the shape of k up to the head dimension, ", k.sizes), v.sizes);
  const int64_t heads = q.size(-2), kv_heads = k.size(-2);
  check(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0), op, "k",
        Rule("number of heads must divide that of q, ", heads, " (GQA)"), kv_heads);
}

// Backward: checks dout or out.
inline void check_like_out(const char* op, const char* name, const View& t,
                           const std::vector<int64_t>& sizes, const View& q) {
  check(t.sizes == sizes, op, name, Rule("must have shape ", sizes), t.sizes);
  check(t.dtype == q.dtype, op, name, Rule("must have the dtype of q, ", q.dtype), t.dtype);
  check_last_contiguous(op, name, t);
  check_device_of_q(op, name, t, q);
}

// Backward: checks lse or dlse, float32 and contiguous.
inline float* check_like_lse(const char* op, const char* name, const View& t,
                             const std::vector<int64_t>& sizes, const View& q) {
  check(t.sizes == sizes, op, name, Rule("must have shape ", sizes), t.sizes);
  check(t.dtype == ScalarType::Float && t.contiguous(), op, name, "must be float32 and contiguous",
        t.dtype);
  check_device_of_q(op, name, t, q);
  return t.mutable_data<float>();
}

inline void check_cu_seqlens(const char* op, const char* name, const View& t, const View& q) {
  check(t.dtype == ScalarType::Int, op, name, "must be int32", t.dtype);
  check(t.dim() == 1 && t.size(0) >= 1, op, name, "must have 1 dimension of at least 1 element",
        t.sizes);
  check_last_contiguous(op, name, t);
  check_device_of_q(op, name, t, q);
}

// Checks the ends of packed sequences, which start at 0, never decrease and end at total. Returns
// the length of the longest sequence.
inline int64_t check_cu_seqlens_values(const char* op, const char* name, const View& cu,
                                       int64_t total) {
  const int32_t* ends = cu.data<int32_t>();
  const int64_t n = cu.size(0);
  check(ends[0] == 0, op, name, "must start at 0", int64_t{ends[0]});
  int64_t longest = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (ends[i] < ends[i - 1])  // copies the ends only on an error
      fail(op, name, "must not decrease", show(std::vector<int64_t>(ends, ends + n)));
    longest = std::max<int64_t>(longest, ends[i] - ends[i - 1]);
  }
  check(ends[n - 1] == total, op, name, Rule("must end at the number of tokens, ", total),
        int64_t{ends[n - 1]});
  return longest;
}

// The same, with an upper bound given by the caller.
inline void check_cu_seqlens_values(const char* op, const char* name, const View& cu, int64_t total,
                                    const char* bound_name, const Optional<int64_t>& bound) {
  const int64_t longest = check_cu_seqlens_values(op, name, cu, total);
  check(!bound || *bound >= longest, op, bound_name,
        Rule("must be at least the longest sequence, ", longest), bound.value_or(0));
}

inline Rows rows_of(const View& t, bool packed) {
  const int64_t d = packed ? 0 : 1;
  return {t.mutable_data(), packed ? 0 : t.step(0), t.step(d), t.step(d + 1)};
}

}  // namespace tokenmill
