#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// Row r of scores [rows, columns] is searched in columns start .. start + length - 1, clamped to
// the existing columns; positions count from start.
struct TopkParams {
  int64_t rows, columns, k;
  DType dtype;
  const void* scores;
  int64_t row_stride;               // elements
  const int32_t* lengths;           // [rows]; null: up to the last column
  const int32_t* row_starts;        // [rows]; null: 0
  bool tie_high;                    // ties go to the higher position
  bool by_score;                    // output in the order of the scores instead of the positions
  int64_t force_first, force_last;  // positions taken whatever their score
  const int32_t* block_table;       // [page_rows, pages], for physical positions
  int64_t page_rows, pages, page_stride;
  int32_t log2_page_size;
  const int32_t* row_to_batch;  // [rows], row of the block_table; null: r
  const int32_t* previous;      // [rows, hints]: any numbers; null: none
  int64_t hints, hint_stride;
  int32_t *indices, *counts;  // [rows, k], -1 past the last; [rows]
  void* values;               // [rows, k] of dtype, -inf past the last; null: not wanted
  int32_t* physical;          // [rows, k], parallel to indices; null: not wanted
  void* workspace;            // CUDA only
};

struct TopkWindow {
  int64_t start, length;
};

TOKENMILL_HOST_DEVICE inline TopkWindow topk_window(const TopkParams& p, int64_t row) {
  int64_t start = p.row_starts ? p.row_starts[row] : 0;
  start = start < 0 ? 0 : start > p.columns ? p.columns : start;
  int64_t length = p.columns - start;
  if (p.lengths && p.lengths[row] < length) length = p.lengths[row] < 0 ? 0 : p.lengths[row];
  return {start, length};
}

// Physical position in a paged cache, -1 if the page does not exist.
TOKENMILL_HOST_DEVICE inline int32_t topk_physical(const TopkParams& p, int64_t row, int64_t i) {
  const int64_t batch = p.row_to_batch ? p.row_to_batch[row] : row;
  const int64_t page = i >> p.log2_page_size;
  if (batch < 0 || batch >= p.page_rows || page >= p.pages) return -1;
  const int64_t found = p.block_table[batch * p.page_stride + page];
  const int64_t slot = (found << p.log2_page_size) + (i - (page << p.log2_page_size));
  return found < 0 || slot > 0x7fffffff ? -1 : static_cast<int32_t>(slot);
}

// CUDA workspace in bytes, on the current device.
int64_t workspace_bytes(const TopkParams&);

// null, or an error message
const char* launch_cuda(const TopkParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(topk_select, TopkParams)
