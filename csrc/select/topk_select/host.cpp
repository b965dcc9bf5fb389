#include <bit>

#include "core/stream.h"
#include "select/checks.h"
#include "select/topk_select/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "topk_select";
constexpr int64_t kMaxK = 65536;

// [R] int32
const int32_t* per_row(const char* name, const View& tensor, const View& scores) {
  return per_request(kOp, name, tensor, scores.size(0), "scores", scores);
}

void run(TopkParams& p, const View& scores) {
  if (scores.is_cuda) return launch_with_workspace(kOp, scores, p, p.workspace);
  cpu::topk_select(p);
}

struct TopkSelectArgs : Record {
  View scores;
  int64_t k;
  View lengths, row_starts;
  std::string_view tie, order;
  int64_t force_first, force_last;
  View block_table;
  int64_t page_size;
  View row_to_batch;
  bool return_values;
  View previous;
};

std::tuple<Array, Array, Array, Array> topk_select(const TopkSelectArgs& a) {
  check(a.scores.dim() == 2, kOp, "scores", "must have 2 dimensions [R, n]", a.scores.dim());
  check_dtype(kOp, "scores", a.scores);
  check_last_contiguous(kOp, "scores", a.scores);
  check(a.scores.size(1) < (int64_t{1} << 31), kOp, "scores", "must have fewer than 2^31 columns",
        a.scores.size(1));
  check(a.k >= 1 && a.k <= kMaxK, kOp, "k", "must be 1 to 65536", a.k);
  check(a.tie == "low" || a.tie == "high", kOp, "tie", "must be 'low' or 'high'", a.tie);
  check(a.order == "index" || a.order == "score", kOp, "order", "must be 'index' or 'score'",
        a.order);
  check(a.force_first >= 0, kOp, "force_first", "must not be negative", a.force_first);
  check(a.force_last >= 0, kOp, "force_last", "must not be negative", a.force_last);
  check(
      a.force_first <= a.k && a.force_last <= a.k - a.force_first, kOp, "force_last",
      Rule("must leave force_first + force_last <= k, ", a.k, ", with force_first ", a.force_first),
      a.force_last);
  TopkParams p{};
  p.rows = a.scores.size(0);
  p.columns = a.scores.size(1);
  p.k = a.k;
  p.dtype = to_dtype(a.scores.dtype);
  p.scores = a.scores.data();
  p.row_stride = a.scores.step(0);
  p.lengths = per_row("lengths", a.lengths, a.scores);
  p.row_starts = per_row("row_starts", a.row_starts, a.scores);
  p.tie_high = a.tie == "high";
  p.by_score = a.order == "score";
  p.force_first = a.force_first;
  p.force_last = a.force_last;
  check(a.page_size >= 1 && a.page_size <= (int64_t{1} << 30) &&
            std::has_single_bit(static_cast<uint64_t>(a.page_size)),
        kOp, "page_size", "must be a power of two", a.page_size);
  p.log2_page_size = std::countr_zero(static_cast<uint64_t>(a.page_size));
  if (a.block_table) {
    const View& t = a.block_table;
    check(t.dim() == 2, kOp, "block_table", "must have 2 dimensions [B, P]", t.dim());
    check(t.dtype == ScalarType::Int, kOp, "block_table", "must be int32", t.dtype);
    check_last_contiguous(kOp, "block_table", t);
    check_device_of(kOp, "block_table", t, "scores", a.scores);
    check(a.row_to_batch || t.size(0) == p.rows, kOp, "block_table",
          Rule("must have a row for each row of scores, ", p.rows, ", without row_to_batch"),
          t.size(0));
    p.block_table = t.data<int32_t>();
    p.page_rows = t.size(0);
    p.pages = t.size(1);
    p.page_stride = t.step(0);
  } else if (a.row_to_batch) {
    fail(kOp, "row_to_batch", "requires block_table", show(a.row_to_batch.sizes));
  }
  p.row_to_batch = per_row("row_to_batch", a.row_to_batch, a.scores);
  if (a.previous) {
    const View& t = a.previous;
    check(t.dim() == 2, kOp, "previous", "must have 2 dimensions [R, K]", t.dim());
    check(t.dtype == ScalarType::Int, kOp, "previous", "must be int32", t.dtype);
    check(t.size(0) == p.rows, kOp, "previous",
          Rule("must have a row for each row of scores, ", p.rows), t.size(0));
    check(t.size(1) >= 1, kOp, "previous", "must have a column", t.size(1));
    check_last_contiguous(kOp, "previous", t);
    check_device_of(kOp, "previous", t, "scores", a.scores);
    p.previous = t.data<int32_t>();
    p.hints = t.size(1);
    p.hint_stride = t.step(0);
  }
  if (!a.scores.is_cuda) {
    for (int64_t r = 0; r < p.rows; ++r) {
      if (p.row_starts)
        check(p.row_starts[r] >= 0 && p.row_starts[r] <= p.columns, kOp, "row_starts",
              Rule("must be 0 to the number of columns, ", p.columns), int64_t{p.row_starts[r]});
    }
    for (int64_t r = 0; r < p.rows && p.row_to_batch; ++r)
      check(p.row_to_batch[r] >= 0 && p.row_to_batch[r] < p.page_rows, kOp, "row_to_batch",
            Rule("must be below the number of rows of block_table, ", p.page_rows),
            int64_t{p.row_to_batch[r]});
  }
  Array indices = empty({p.rows, a.k}, a.scores, ScalarType::Int);
  Array counts = empty({p.rows}, a.scores, ScalarType::Int);
  Array values =
      empty(a.return_values ? std::vector{p.rows, a.k} : std::vector<int64_t>{0}, a.scores);
  Array physical = empty(a.block_table ? std::vector{p.rows, a.k} : std::vector<int64_t>{0},
                         a.scores, ScalarType::Int);
  p.indices = indices.mutable_data<int32_t>();
  p.counts = counts.mutable_data<int32_t>();
  p.values = a.return_values ? values.mutable_data() : nullptr;
  p.physical = a.block_table ? physical.mutable_data<int32_t>() : nullptr;
  if (p.rows > 0) run(p, a.scores);
  return {indices, counts, values, physical};
}

const Registration kOperators({&implement<topk_select>("topk_select")});

}  // namespace
}  // namespace tokenmill
