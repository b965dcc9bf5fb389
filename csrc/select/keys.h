// Addressing of a request's keys, packed or paged. Free of torch.
#pragma once
#include "core/dtype.h"

namespace tokenmill {

// Row t of request b: without a table at b * batch + t * seq; with one at row t % page_size of page
// table[b][t / page_size], pages being `batch` elements apart. Strides in elements.
struct KeyRows {
  const void* data;
  int64_t batch, seq, head;
  int64_t rows;          // per request
  const int32_t* table;  // [B, *]; null: none
  int64_t table_stride, page_size, pages;
};

// Rows t .. end - 1 are `seq` apart from `offset` on; offset < 0: their page does not exist.
struct KeyRun {
  int64_t offset, end;
};

TOKENMILL_HOST_DEVICE inline KeyRun key_run(const KeyRows& k, int64_t b, int64_t t) {
  if (!k.table) return {b * k.batch + t * k.seq, k.rows};
  const int64_t page = t / k.page_size, first = page * k.page_size;
  const int64_t found = k.table[b * k.table_stride + page];
  const bool there = found >= 0 && found < k.pages;
  return {there ? found * k.batch + (t - first) * k.seq : -1, first + k.page_size};
}

// lengths [B] clamped to the number of rows; null: all.
TOKENMILL_HOST_DEVICE inline int64_t clamped_length(const int32_t* lengths, int64_t b,
                                                    int64_t maximum) {
  if (!lengths || lengths[b] > maximum) return maximum;
  return lengths[b] < 0 ? 0 : lengths[b];
}

// End of a packed sequence, clamped to the number of rows.
TOKENMILL_HOST_DEVICE inline int64_t packed_end(const int32_t* cu_seqlens, int64_t i,
                                                int64_t rows) {
  const int64_t end = cu_seqlens[i];
  return end < 0 ? 0 : end > rows ? rows : end;
}

}  // namespace tokenmill
