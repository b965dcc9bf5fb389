#pragma once
#include "core/dtype.h"
#include "core/rows.h"
#include "cpu/isa.h"

namespace tokenmill {

// Key keep[d] of a list moves to slot d <= keep[d], in the order of d. Entries that violate this,
// or that lie on a nonexistent page, are skipped.
struct CompactParams {
  int64_t batch, heads;
  int64_t capacity;  // tokens per request
  int64_t key_dim, value_dim;
  DType dtype;
  Rows k, v;            // [B, S, Hk, D], paged [P, page size, Hk, D]
  const int32_t* keep;  // [B, Hk or 1, entries], strided
  int64_t keep_batch, keep_head, entries;
  const int32_t* counts;  // [B, Hk or 1], strided
  int64_t counts_batch, counts_head;
  const int32_t* lengths;      // [B], null: capacity
  const int32_t* block_table;  // [B, pages per request], or null: request b only has page b
  int64_t table_stride, pages;
  int32_t log2_page_size;
  // Revolutions of each pair per slot, as the sum of two floats; null: no rotation.
  const float *turns, *turns_rest;
  int64_t pairs;
  bool interleaved;      // pairs (2 i, 2 i + 1), or (i, i + pairs)
  bool per_head;         // lists, and outputs derived from them
  int32_t* new_lengths;  // shape of counts, contiguous
  // Sums over the dropped keys and values, [B, Hk, D] each, and their number [B, Hk]; null: not
  // wanted.
  float *k_sum, *v_sum;
  int32_t* dropped;

  TOKENMILL_HOST_DEVICE const int32_t* list(int64_t b, int64_t h) const {
    return keep + b * keep_batch + h * keep_head;
  }
  TOKENMILL_HOST_DEVICE int64_t count(int64_t b, int64_t h) const {
    const int64_t n = counts[b * counts_batch + h * counts_head];
    return n < 0 ? 0 : n > entries ? entries : n;
  }
  TOKENMILL_HOST_DEVICE int64_t length(int64_t b) const {
    const int64_t n = lengths ? lengths[b] : capacity;
    return n < 0 ? 0 : n > capacity ? capacity : n;
  }
  // Offset in elements for head 0; -1 if the page does not exist.
  TOKENMILL_HOST_DEVICE int64_t offset(const Rows& rows, int64_t b, int64_t t) const {
    if (!block_table) return b * rows.batch + t * rows.seq;
    const int64_t page = block_table[b * table_stride + (t >> log2_page_size)];
    const int64_t row = t & ((int64_t{1} << log2_page_size) - 1);
    return page < 0 || page >= pages ? -1 : page * rows.batch + row * rows.seq;
  }
};

// null, or an error message
const char* launch_cuda(const CompactParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(kv_cache_compact, CompactParams)
