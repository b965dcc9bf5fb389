#include "core/qkv.h"
#include "core/stream.h"
#include "select/checks.h"
#include "select/hip_block_select/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "hip_block_select";

constexpr std::pair<std::string_view, Representative> kRepresentatives[] = {
    {"first", Representative::first},
    {"middle", Representative::middle},
    {"last", Representative::last}};
constexpr int64_t kMaxBlock = 128;    // keys per block
constexpr int64_t kMaxBlocks = 2048;  // per list
constexpr int64_t kNever = int64_t{1} << 32;

// Lists to start from, or their counts; the leading `dims` dimensions match the counts. null if not
// given.
const int32_t* start_list(const char* name, const View& tensor, const std::vector<int64_t>& shape,
                          size_t dims, bool exact, const View& q, int64_t (&strides)[3]) {
  if (!tensor) return nullptr;
  const View& t = tensor;
  if (exact)
    fail(kOp, name, "must be None with bound 'minmax'", "a tensor of shape " + show(t.sizes));
  check(t.sizes == shape, kOp, name, Rule("must have the shape of the result, ", shape), t.sizes);
  check(t.dtype == ScalarType::Int, kOp, name, "must be int32", t.dtype);
  check_last_contiguous(kOp, name, t);
  check_device_of(kOp, name, t, "q", q);
  for (size_t i = 0; i < dims; ++i) strides[3 - dims + i] = t.step(static_cast<int64_t>(i));
  return t.data<int32_t>();
}

void run(HipParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  cpu::hip_block_select(p);
}

struct HipBlockSelectArgs : Record {
  View q, k;
  int64_t budget, block_q, block_k, stride_q;
  std::string_view representative;
  int64_t num_sink, num_recent;
  std::string_view bound;
  View start_indices, start_counts;
  int64_t restart_span;
  bool causal;
  std::string_view head_reduce;
  View seqlens_k, block_table, seqlens_q, cu_seqlens_q, cu_seqlens_k;
};

void check_rows(const HipBlockSelectArgs& a) {
  constexpr const char* kPacked = "must have 3 dimensions [T, H, D] (packed)";
  check(a.q.dim() == (a.cu_seqlens_q ? 3 : 4), kOp, "q",
        a.cu_seqlens_q ? kPacked : "must have 4 dimensions [B, S, H, D]", a.q.dim());
  check(
      a.k.dim() == (a.cu_seqlens_k ? 3 : 4), kOp, "k",
      a.cu_seqlens_k ? kPacked : "must have 4 dimensions [B, S, H, D] or [pages, page_size, H, D]",
      a.k.dim());
  check_dtype(kOp, "q", a.q);
  check(a.k.dtype == a.q.dtype, kOp, "k", Rule("must have the dtype of q, ", a.q.dtype), a.k.dtype);
  check_device_of(kOp, "k", a.k, "q", a.q);
  check_last_contiguous(kOp, "q", a.q);
  check_last_contiguous(kOp, "k", a.k);
  const int64_t heads = a.q.size(-2), dim = a.q.size(-1), kv_heads = a.k.size(-2);
  check_head_dim(kOp, "q", a.q);
  check(a.k.size(-1) == dim, kOp, "k", Rule("must have the head dimension of q, ", dim),
        a.k.size(-1));
  check(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0), kOp, "k",
        Rule("number of heads must divide that of q, ", heads, " (GQA)"), kv_heads);
}

KeyRows keys_of(const HipBlockSelectArgs& a) {
  const View& k = a.k;
  if (!a.cu_seqlens_k) return key_rows(k, a.block_table);
  return {k.data(), 0, k.step(0), k.step(1), k.size(0), nullptr, 0, k.size(0), 0};
}

void check_values(const HipBlockSelectArgs& a, const HipParams& p) {
  if (a.cu_seqlens_q) check_cu_seqlens_values(kOp, "cu_seqlens_q", a.cu_seqlens_q, p.queries);
  check_length_values(kOp, "seqlens_q", p.query_counts, p.batch, p.queries);
  if (a.cu_seqlens_k) check_cu_seqlens_values(kOp, "cu_seqlens_k", a.cu_seqlens_k, p.k.rows);
  check_length_values(kOp, "seqlens_k", p.lengths, p.batch, p.k.rows);
  check_block_table_values(kOp, p.k, p.batch, p.lengths);
}

std::tuple<Array, Array> hip_block_select(const HipBlockSelectArgs& a) {
  check_rows(a);
  HipParams p{};
  p.batch = check_sequences(kOp, a.q, a.k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k,
                            a.block_table, a.seqlens_q);
  check(a.block_k >= 1 && a.block_k <= kMaxBlock, kOp, "block_k", Rule("must be 1 to ", kMaxBlock),
        a.block_k);
  for (const auto& [name, size] : {std::pair{"block_q", a.block_q},
                                   {"stride_q", a.stride_q},
                                   {"restart_span", a.restart_span}})
    check(size >= 1 && size < (int64_t{1} << 31), kOp, name, "must be 1 to 2^31 - 1", size);
  p.wanted = a.budget / a.block_k;
  check(a.budget % a.block_k == 0 && p.wanted >= 1 && p.wanted <= kMaxBlocks, kOp, "budget",
        Rule("must be a multiple of block_k, from 1 to ", kMaxBlocks, " times"), a.budget);
  p.representative = choose(kOp, "representative", kRepresentatives, a.representative);
  check(a.num_sink >= 0, kOp, "num_sink", "must not be negative", a.num_sink);
  check(a.num_recent >= 0, kOp, "num_recent", "must not be negative", a.num_recent);
  check(a.bound == "sample" || a.bound == "minmax", kOp, "bound", "must be 'sample' or 'minmax'",
        a.bound);
  check(a.head_reduce == "none" || a.head_reduce == "group_max", kOp, "head_reduce",
        "must be 'none' or 'group_max'", a.head_reduce);
  const bool packed = bool(a.cu_seqlens_q);
  const int64_t heads = a.q.size(-2), kv_heads = a.k.size(-2);
  p.query_counts = per_request(kOp, "seqlens_q", a.seqlens_q, p.batch, "q", a.q);
  p.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, p.batch, "k", a.k);
  if (packed) p.cu_seqlens_q = a.cu_seqlens_q.data<int32_t>();
  if (a.cu_seqlens_k) p.cu_seqlens_k = a.cu_seqlens_k.data<int32_t>();
  p.lists = a.head_reduce == "none" ? heads : kv_heads;
  p.kv_heads = kv_heads;
  p.head_dim = a.q.size(-1);
  p.group = p.lists > 0 ? heads / p.lists : 1;
  p.queries = a.q.size(packed ? 0 : 1);
  p.block_q = a.block_q;
  p.blocks = packed ? p.queries / a.block_q + p.batch : ceil_div(p.queries, a.block_q);
  p.stride_q = a.stride_q;
  p.block_k = a.block_k;
  p.num_sink = std::min(a.num_sink, kNever);
  p.num_recent = std::min(a.num_recent, kNever);
  p.exact = a.bound == "minmax";
  p.causal = a.causal;
  p.dtype = to_dtype(a.q.dtype);
  p.q = rows_of(a.q, packed);
  p.k = keys_of(a);
  p.restart_span = a.restart_span;
  std::vector<int64_t> rows{p.batch, p.lists, p.blocks};
  if (packed) rows.erase(rows.begin());
  std::vector<int64_t> lists = rows;
  lists.push_back(p.wanted);
  p.start = start_list("start_indices", a.start_indices, lists, rows.size(), p.exact, a.q,
                       p.start_strides);
  p.start_counts = start_list("start_counts", a.start_counts, rows, rows.size(), p.exact, a.q,
                              p.start_count_strides);
  if (a.start_indices && !a.start_counts)
    fail(kOp, "start_counts", "must be given with start_indices", "None");
  check(p.k.rows < (int64_t{1} << 31), kOp, "k", "must have less than 2^31 keys of a request",
        p.k.rows);
  if (!a.q.is_cuda) check_values(a, p);
  Array indices = empty(lists, a.q, ScalarType::Int);
  Array counts = empty(rows, a.q, ScalarType::Int);
  p.indices = indices.mutable_data<int32_t>();
  p.counts = counts.mutable_data<int32_t>();
  if (heads > 0 && p.batch > 0 && counts.numel() > 0) {
    run(p, a.q);
  } else {  // no queries
    fill(-1, indices);
    fill(0, counts);
  }
  return {indices, counts};
}

const Registration kOperators({&implement<hip_block_select>("hip_block_select")});

}  // namespace
}  // namespace tokenmill
