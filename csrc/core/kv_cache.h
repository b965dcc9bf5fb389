// KV cache, dense or paged, as kernels see it. Free of torch; core/kv_cache_checks.h fills it.
#pragma once
#include "core/dtype.h"
#include "core/rows.h"

namespace tokenmill {

// Dequantisation scale of a float8_e4m3fn cache, in float32: one number, one per KV head, or one
// per token and KV head. Strides in elements, 0 where tokens or heads share it.
struct CacheScale {
  const float* data;  // null: 1
  int64_t page, row, head;

  TOKENMILL_HOST_DEVICE float at(int64_t i_page, int64_t i_row, int64_t i_head) const {
    return data ? data[i_page * page + i_row * row + i_head * head] : 1.0f;
  }
};

// Lengths and page numbers come from tensors that a GPU cannot check without a synchronisation:
// both are clamped, so that no address lies outside of the cache.
struct KvCache {
  Rows k, v;    // [pages, page size, Hk, D]: batch is the stride between pages
  DType dtype;  // dtype of q, or float8_e4m3fn
  CacheScale k_scale, v_scale;
  const int32_t* seqlens;      // [B], or null
  const int32_t* block_table;  // [B, pages per request], or null: request b has only page b
  int64_t table_stride;
  int64_t pages;
  int64_t capacity;  // max keys of a request
  int32_t log2_page_size;

  struct Slot {
    int32_t page, row;
  };

  TOKENMILL_HOST_DEVICE int64_t length(int64_t b) const {
    const int64_t n = seqlens[b];
    return n < 0 ? 0 : n > capacity ? capacity : n;
  }

  // page < 0: there is no such page
  TOKENMILL_HOST_DEVICE Slot find(int64_t b, int64_t t) const {
    if (!block_table) return {static_cast<int32_t>(b), static_cast<int32_t>(t)};
    const int32_t page = block_table[b * table_stride + (t >> log2_page_size)];
    return {page < pages ? page : -1,
            static_cast<int32_t>(t & ((int64_t{1} << log2_page_size) - 1))};
  }

  TOKENMILL_HOST_DEVICE Slot slot(int64_t b, int64_t t) const {
    const Slot at = find(b, t);
    return {at.page < 0 ? 0 : at.page, at.row};
  }

  // Offset of a row of k or v, in elements.
  TOKENMILL_HOST_DEVICE static int64_t offset(const Rows& rows, Slot at, int64_t head) {
    return at.page * rows.batch + at.row * rows.seq + head * rows.head;
  }
};

}  // namespace tokenmill
