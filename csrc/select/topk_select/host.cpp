#include <bit>

#include "core/stream.h"
#include "select/checks.h"
#include "select/topk_select/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "topk_select";
constexpr int64_t kMaxK = 65536;

// [R] int32
const int32_t* per_row(const char* name, const OptTensor& tensor, const View& scores) {
  return per_request(kOp, name, tensor, scores.size(0), "scores", scores);
}

void run(TopkParams& p, const View& scores) {
#if defined(TOKENMILL_WITH_CUDA)
  if (scores.is_cuda) {
    const int64_t bytes = (CudaScope(scores.device), workspace_bytes(p));
    Tensor workspace = empty({bytes}, scores.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, scores, p);
  }
#endif
  cpu::topk_select(p);
}

// The checks are those of python/tokenmill/select/topk_select.py, in its order and words.
std::tuple<Tensor, Tensor, Tensor, Tensor> topk_select(Tensor scores, int64_t k, OptTensor lengths,
                                                       OptTensor row_starts, std::string tie,
                                                       std::string order, int64_t force_first,
                                                       int64_t force_last, OptTensor block_table,
                                                       int64_t page_size, OptTensor row_to_batch,
                                                       bool return_values) {
  const View s(scores);
  check(s.dim() == 2, kOp, "scores", "must have 2 dimensions [R, n]", s.dim());
  check(is_kernel_dtype(s.dtype), kOp, "scores", "must be float16, bfloat16 or float32", s.dtype);
  check_last_contiguous(kOp, "scores", s);
  check(s.size(1) < (int64_t{1} << 31), kOp, "scores", "must have fewer than 2^31 columns",
        s.size(1));
  check(k >= 1 && k <= kMaxK, kOp, "k", "must be 1 to 65536", k);
  check(tie == "low" || tie == "high", kOp, "tie", "must be 'low' or 'high'", tie);
  check(order == "index" || order == "score", kOp, "order", "must be 'index' or 'score'", order);
  check(force_first >= 0, kOp, "force_first", "must not be negative", force_first);
  check(force_last >= 0, kOp, "force_last", "must not be negative", force_last);
  check(force_first <= k && force_last <= k - force_first, kOp, "force_last",
        Rule("must leave force_first + force_last <= k, ", k, ", with force_first ", force_first),
        force_last);
  TopkParams p{};
  p.rows = s.size(0);
  p.columns = s.size(1);
  p.k = k;
  p.dtype = to_dtype(s.dtype);
  p.scores = s.data();
  p.row_stride = s.step(0);
  p.lengths = per_row("lengths", lengths, s);
  p.row_starts = per_row("row_starts", row_starts, s);
  p.tie_high = tie == "high";
  p.by_score = order == "score";
  p.force_first = force_first;
  p.force_last = force_last;
  check(page_size >= 1 && page_size <= (int64_t{1} << 30) &&
            std::has_single_bit(static_cast<uint64_t>(page_size)),
        kOp, "page_size", "must be a power of two", page_size);
  p.log2_page_size = std::countr_zero(static_cast<uint64_t>(page_size));
  if (block_table) {
    const View t(*block_table);
    check(t.dim() == 2, kOp, "block_table", "must have 2 dimensions [B, P]", t.dim());
    check(t.dtype == ScalarType::Int, kOp, "block_table", "must be int32", t.dtype);
    check_last_contiguous(kOp, "block_table", t);
    check_device_of(kOp, "block_table", t, "scores", s);
    check(row_to_batch || t.size(0) == p.rows, kOp, "block_table",
          Rule("must have a row for each row of scores, ", p.rows, ", without row_to_batch"),
          t.size(0));
    p.block_table = t.data<int32_t>();
    p.page_rows = t.size(0);
    p.pages = t.size(1);
    p.page_stride = t.step(0);
  } else if (row_to_batch) {
    fail(kOp, "row_to_batch", "goes with block_table alone", show(View(*row_to_batch).sizes));
  }
  p.row_to_batch = per_row("row_to_batch", row_to_batch, s);
  if (!s.is_cuda) {
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
  Tensor indices = empty({p.rows, k}, scores, ScalarType::Int);
  Tensor counts = empty({p.rows}, scores, ScalarType::Int);
  Tensor values = empty(return_values ? std::vector{p.rows, k} : std::vector<int64_t>{0}, scores);
  Tensor physical = empty(block_table ? std::vector{p.rows, k} : std::vector<int64_t>{0}, scores,
                          ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  p.values = return_values ? values.mutable_data_ptr() : nullptr;
  p.physical = static_cast<int32_t*>(physical.mutable_data_ptr());
  if (p.rows > 0) run(p, s);
  return {indices, counts, values, physical};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("topk_select", TOKENMILL_BOX(topk_select)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("topk_select", TOKENMILL_BOX(topk_select)); }
#endif

}  // namespace tokenmill
