#include "core/qkv.h"
#include "core/stream.h"
#include "select/checks.h"
#include "select/hip_block_select/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "hip_block_select";
constexpr int64_t kMaxBlock = 128;    // keys of a block
constexpr int64_t kMaxBlocks = 2048;  // of a list
constexpr int64_t kNever = int64_t{1} << 32;

// A list to start from, or its counts: null if not given.
const int32_t* start_list(const char* name, const OptTensor& tensor,
                          const std::vector<int64_t>& shape, bool exact, const View& q,
                          int64_t (&strides)[3]) {
  if (!tensor) return nullptr;
  const View t(*tensor);
  if (exact)
    fail(kOp, name, "must be None with bound 'minmax'", "a tensor of shape " + show(t.sizes));
  check(t.sizes == shape, kOp, name, Rule("must have the shape of the result, ", shape), t.sizes);
  check(t.dtype == ScalarType::Int, kOp, name, "must be int32", t.dtype);
  check_last_contiguous(kOp, name, t);
  check_device_of(kOp, name, t, "q", q);
  for (int i = 0; i < 3; ++i) strides[i] = t.step(i);
  return t.data<int32_t>();
}

void run(const HipParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, p);
#endif
  cpu::hip_block_select(p);
}

// The checks are those of python/tokenmill/sparse/hip_block_select.py, in its order and words.
std::tuple<Tensor, Tensor> hip_block_select(
    Tensor q, Tensor k, int64_t budget, int64_t block_q, int64_t block_k, int64_t stride_q,
    std::string representative, int64_t num_sink, int64_t num_recent, std::string bound,
    OptTensor start_indices, OptTensor start_counts, int64_t restart_span, bool causal,
    std::string head_reduce, OptTensor seqlens_k, OptTensor block_table) {
  const View qv(q), kv(k);
  check(qv.dim() == 4, kOp, "q", "must have 4 dimensions [B, S, H, D]", qv.dim());
  check(kv.dim() == 4, kOp, "k", "must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]",
        kv.dim());
  check(is_kernel_dtype(qv.dtype), kOp, "q", "must be float16, bfloat16 or float32", qv.dtype);
  check(kv.dtype == qv.dtype, kOp, "k", Rule("must have the dtype of q, ", qv.dtype), kv.dtype);
  check_device_of(kOp, "k", kv, "q", qv);
  check_last_contiguous(kOp, "q", qv);
  check_last_contiguous(kOp, "k", kv);
  const int64_t dim = qv.size(3);
  check(dim >= 1 && dim <= kMaxHeadDim, kOp, "q",
        Rule("must have a head dimension of 1 to ", kMaxHeadDim), dim);
  check(kv.size(3) == dim, kOp, "k", Rule("must have the head dimension of q, ", dim), kv.size(3));
  const int64_t heads = qv.size(2), kv_heads = kv.size(2);
  check(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0), kOp, "k",
        Rule("number of heads must divide that of q, ", heads, " (GQA)"), kv_heads);
  check_block_table(kOp, block_table, kv);
  const int64_t batch = batch_of(kv, block_table);
  check(batch == qv.size(0), kOp, block_table ? "block_table" : "k",
        Rule("must have the batch size of q, ", qv.size(0)), batch);
  check(block_k >= 1 && block_k <= kMaxBlock, kOp, "block_k", Rule("must be 1 to ", kMaxBlock),
        block_k);
  for (const auto& [name, size] :
       {std::pair{"block_q", block_q}, {"stride_q", stride_q}, {"restart_span", restart_span}})
    check(size >= 1 && size < (int64_t{1} << 31), kOp, name, "must be 1 to 2^31 - 1", size);
  const int64_t wanted = budget / block_k;
  check(budget % block_k == 0 && wanted >= 1 && wanted <= kMaxBlocks, kOp, "budget",
        Rule("must be a multiple of block_k, from 1 to ", kMaxBlocks, " times"), budget);
  check(representative == "first" || representative == "middle" || representative == "last", kOp,
        "representative", "must be 'first', 'middle' or 'last'", representative);
  check(num_sink >= 0, kOp, "num_sink", "must not be negative", num_sink);
  check(num_recent >= 0, kOp, "num_recent", "must not be negative", num_recent);
  check(bound == "sample" || bound == "minmax", kOp, "bound", "must be 'sample' or 'minmax'",
        bound);
  check(head_reduce == "none" || head_reduce == "group_max", kOp, "head_reduce",
        "must be 'none' or 'group_max'", head_reduce);
  HipParams p{};
  p.lengths = per_request(kOp, "seqlens_k", seqlens_k, batch, "k", kv);
  p.batch = batch;
  p.lists = head_reduce == "none" ? heads : kv_heads;
  p.kv_heads = kv_heads;
  p.head_dim = dim;
  p.group = p.lists > 0 ? heads / p.lists : 1;
  p.queries = qv.size(1);
  p.block_q = block_q;
  p.blocks = ceil_div(p.queries, block_q);
  p.stride_q = stride_q;
  p.block_k = block_k;
  p.wanted = wanted;
  p.num_sink = std::min(num_sink, kNever);
  p.num_recent = std::min(num_recent, kNever);
  p.representative = representative == "first"  ? Representative::first
                     : representative == "last" ? Representative::last
                                                : Representative::middle;
  p.exact = bound == "minmax";
  p.causal = causal;
  p.dtype = to_dtype(qv.dtype);
  p.q = rows_of(qv, false);
  p.k = key_rows(kv, block_table);
  p.restart_span = restart_span;
  p.start = start_list("start_indices", start_indices, {batch, p.lists, p.blocks, wanted}, p.exact,
                       qv, p.start_strides);
  p.start_counts = start_list("start_counts", start_counts, {batch, p.lists, p.blocks}, p.exact, qv,
                              p.start_count_strides);
  if (start_indices && !start_counts)
    fail(kOp, "start_counts", "must be given with start_indices", "None");
  check(p.k.rows < (int64_t{1} << 31), kOp, "k", "must have less than 2^31 keys of a request",
        p.k.rows);
  if (!qv.is_cuda) {
    check_length_values(kOp, "seqlens_k", p.lengths, batch, p.k.rows);
    check_block_table_values(kOp, p.k, batch, p.lengths);
  }
  Tensor indices = empty({batch, p.lists, p.blocks, wanted}, q, ScalarType::Int);
  Tensor counts = empty({batch, p.lists, p.blocks}, q, ScalarType::Int);
  p.indices = static_cast<int32_t*>(indices.mutable_data_ptr());
  p.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  if (heads > 0 && counts.numel() > 0) {
    run(p, qv);
  } else {  // nothing speaks for a list
    torch::stable::fill_(indices, -1);
    torch::stable::zero_(counts);
  }
  return {indices, counts};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("hip_block_select", TOKENMILL_BOX(hip_block_select)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("hip_block_select", TOKENMILL_BOX(hip_block_select)); }
#endif

}  // namespace tokenmill
