#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

// A row x [D] of float8_e4m3fn is stored as round(x / scale), saturated at +-448. A per-token scale
// is max|x| / 448 over the finite elements, or 1 if that is below the normal numbers.
constexpr float kFloat8Max = 448.f, kMinScale = 1.17549435e-38f;

// [T] of int32 or int64.
struct Ints {
  const void* data;
  int64_t stride;
  bool wide;

  TOKENMILL_HOST_DEVICE int64_t at(int64_t t) const {
    return wide ? static_cast<const int64_t*>(data)[t * stride]
                : static_cast<const int32_t*>(data)[t * stride];
  }
};

// New keys or values, and their destination.
struct AppendedRows {
  int64_t dim;
  Rows rows;           // [T, Hk, D]
  Rows cache;          // [P, page size, Hk, D]
  const float* scale;  // [1] or [Hk], input; null: 1
  int64_t scale_head;
  Rows token_scale;  // [P, page size, Hk] float32, output; data null: none
};

struct AppendParams {
  int64_t tokens, heads, value_heads;  // value_heads: same as heads, or 0: no values
  DType dtype, cache_dtype;            // the same, or float8_e4m3fn for the cache
  AppendedRows k, v;
  Rows q;  // [T, H, D], rotated into q_out, which is contiguous
  void* q_out;
  int64_t query_heads;  // 0: no q
  Ints slots;           // page * page_size + row
  int64_t pages, page_size;
  // Row positions[t] of [table, pairs] rotates the pairs of a row; cos null: no rotation.
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, table, pairs;
  int64_t rope_offset;  // first of the 2 pairs rotated columns
  Ints positions;
  bool interleaved;  // pairs (2 i, 2 i + 1) of these columns, or (i, i + pairs)

  struct Place {
    int64_t page, row;
  };
  // page < 0: the token is not stored
  TOKENMILL_HOST_DEVICE Place place(int64_t t) const {
    const int64_t slot = slots.at(t);
    if (slot < 0 || slot >= pages * page_size) return {-1, 0};
    if (slot >> 31 == 0 && page_size >> 31 == 0) {  // a tenth of the instructions on a GPU
      const auto low = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(page_size);
      return {low / size, low % size};
    }
    return {slot / page_size, slot % page_size};
  }
  // Clamped to the tables.
  TOKENMILL_HOST_DEVICE int64_t position(int64_t t) const {
    const int64_t at = positions.at(t);
    return at < 0 ? 0 : at < table ? at : table - 1;
  }
};

// null, or an error message
const char* launch_cuda(const AppendParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(kv_cache_append, AppendParams)
