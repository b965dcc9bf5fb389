#include <algorithm>
#include <limits>

#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "select/checks.h"
#include "select/indexer_topk_select/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "indexer_topk_select";
constexpr int64_t kMaxHeads = 64, kMaxTopk = 65536;
constexpr int64_t kUnbounded = int64_t{1} << 31;  // larger than any key index

void run(IndexerParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  cpu::indexer_topk_select(p);
}

struct IndexerTopkSelectArgs : Record {
  View q, k, weights;
  int64_t topk;
  bool causal;
  std::string_view activation;
  int64_t block_k, num_sink, num_recent;
  View seqlens_k, cu_seqlens_q, cu_seqlens_k, block_table;
  bool return_values;
  View k_scale, previous;
};

void check_rows(const IndexerTopkSelectArgs& a) {
  const bool packed = bool(a.cu_seqlens_q);
  check(
      a.q.dim() == (packed ? 3 : 4), kOp, "q",
      packed ? "must have 3 dimensions [T, H, D] (packed)" : "must have 4 dimensions [B, S, H, D]",
      a.q.dim());
  check(a.k.dim() == (a.cu_seqlens_k ? 2 : 3), kOp, "k",
        a.cu_seqlens_k ? "must have 2 dimensions [T, D] (packed)"
                       : "must have 3 dimensions [B, S, D] or [pages, page_size, D]",
        a.k.dim());
  check_dtype(kOp, "q", a.q);
  check_cache_dtype(kOp, "k", a.k, a.q);
  const std::vector<int64_t> wanted(a.q.sizes.begin(), a.q.sizes.end() - 1);
  check(a.weights.sizes == wanted, kOp, "weights", Rule("must have shape ", wanted),
        a.weights.sizes);
  check(a.weights.dtype == ScalarType::Float || a.weights.dtype == a.q.dtype, kOp, "weights",
        Rule("must be float32 or have the dtype of q, ", a.q.dtype), a.weights.dtype);
  const std::pair<const char*, const View*> all[] = {
      {"q", &a.q}, {"k", &a.k}, {"weights", &a.weights}};
  for (auto [name, t] : {all[1], all[2]}) check_device_of_q(kOp, name, *t, a.q);
  for (auto [name, t] : all) check_last_contiguous(kOp, name, *t);
  const int64_t heads = a.q.size(-2), dim = a.q.size(-1);
  check(heads >= 1 && heads <= kMaxHeads, kOp, "q", Rule("must have 1 to ", kMaxHeads, " heads"),
        heads);
  check_head_dim(kOp, "q", a.q);
  check(a.k.size(-1) == dim, kOp, "k", Rule("must have the head dimension of q, ", dim),
        a.k.size(-1));
}

KeyRows keys_of(const IndexerTopkSelectArgs& a) {
  const View& k = a.k;
  if (a.cu_seqlens_k) return {k.data(), 0, k.step(0), 0, k.size(0), nullptr, 0, k.size(0), 0};
  return key_rows(k, a.block_table);
}

void set_scale(IndexerParams& p, const IndexerTopkSelectArgs& a) {
  if (!a.k_scale) return;
  const View& t = a.k_scale;
  check(a.k.dtype == ScalarType::Float8_e4m3fn, kOp, "k_scale", "requires a cache in float8_e4m3fn",
        a.k.dtype);
  const std::vector<int64_t> one{1}, each(a.k.sizes.begin(), a.k.sizes.end() - 1);
  check(t.sizes == one || t.sizes == each, kOp, "k_scale", Rule("must have shape [1] or ", each),
        t.sizes);
  check_wide(kOp, "k_scale", t, a.q);
  check_device_of_q(kOp, "k_scale", t, a.q);
  const bool shared = t.sizes != each;
  p.k_scale = p.k;
  p.k_scale.data = t.data();
  p.k_scale.batch = shared || t.dim() == 1 ? 0 : t.step(0);
  p.k_scale.seq = shared ? 0 : t.step(t.dim() - 1);
}

void set_previous(IndexerParams& p, const IndexerTopkSelectArgs& a) {
  if (!a.previous) return;
  const View& t = a.previous;
  const bool packed = bool(a.cu_seqlens_q);
  check(t.dim() == a.q.dim() - 1, kOp, "previous",
        packed ? "must have 2 dimensions [T, K] (packed)" : "must have 3 dimensions [B, Sq, K]",
        t.dim());
  check(t.dtype == ScalarType::Int, kOp, "previous", "must be int32", t.dtype);
  const std::vector<int64_t> wanted(a.q.sizes.begin(), a.q.sizes.end() - 2);
  const std::vector<int64_t> lists(t.sizes.begin(), t.sizes.end() - 1);
  check(lists == wanted, kOp, "previous", Rule("must have a list for each query, ", wanted), lists);
  p.hints = t.size(-1);
  check(p.hints >= 1, kOp, "previous", "must have a column", p.hints);
  check_last_contiguous(kOp, "previous", t);
  check_device_of_q(kOp, "previous", t, a.q);
  p.previous = {t.mutable_data(), packed ? 0 : t.step(0), t.step(packed ? 0 : 1), 0};
}

void check_values(const IndexerTopkSelectArgs& a, const IndexerParams& p) {
  if (a.cu_seqlens_q) check_cu_seqlens_values(kOp, "cu_seqlens_q", a.cu_seqlens_q, p.tokens);
  if (a.cu_seqlens_k) check_cu_seqlens_values(kOp, "cu_seqlens_k", a.cu_seqlens_k, p.k.rows);
  check_length_values(kOp, "seqlens_k", p.lengths, p.batch, p.k.rows);
  check_block_table_values(kOp, p.k, p.batch, p.lengths);
}

IndexerParams make_params(const IndexerTopkSelectArgs& a) {
  check(a.activation == "relu" || a.activation == "none", kOp, "activation",
        "must be 'relu' or 'none'", a.activation);
  check_rows(a);
  IndexerParams p{};
  p.batch =
      check_sequences(kOp, a.q, a.k, a.seqlens_k, a.cu_seqlens_q, a.cu_seqlens_k, a.block_table);
  check(a.topk >= 1 && a.topk <= kMaxTopk, kOp, "topk", Rule("must be 1 to ", kMaxTopk), a.topk);
  check(a.block_k >= 1 && a.block_k < kUnbounded, kOp, "block_k", "must be 1 to 2^31 - 1",
        a.block_k);
  check(a.num_sink >= 0, kOp, "num_sink", "must not be negative", a.num_sink);
  check(a.num_recent >= 0, kOp, "num_recent", "must not be negative", a.num_recent);
  p.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, p.batch, "k", a.k);
  p.k = keys_of(a);
  check(p.k.rows < kUnbounded, kOp, "k", "must have less than 2^31 keys of a request", p.k.rows);
  set_scale(p, a);
  set_previous(p, a);
  const bool packed = bool(a.cu_seqlens_q);
  p.heads = a.q.size(-2);
  p.head_dim = a.q.size(-1);
  p.queries = packed ? 0 : a.q.size(1);
  p.tokens = packed ? a.q.size(0) : p.batch * p.queries;
  p.topk = a.topk;
  p.block_k = std::clamp<int64_t>(p.k.rows, 1, a.block_k);
  p.causal = a.causal;
  p.relu = a.activation == "relu";
  p.dtype = to_dtype(a.q.dtype);
  p.key_dtype = to_dtype(a.k.dtype);
  p.weight_dtype = to_dtype(a.weights.dtype);
  p.q = rows_of(a.q, packed);
  p.weights = {a.weights.mutable_data(), packed ? 0 : a.weights.step(0),
               a.weights.step(packed ? 0 : 1), 0};
  if (packed) p.cu_seqlens_q = a.cu_seqlens_q.data<int32_t>();
  if (a.cu_seqlens_k) p.cu_seqlens_k = a.cu_seqlens_k.data<int32_t>();
  p.num_sink = std::min(a.num_sink, kUnbounded);
  p.num_recent = std::min(a.num_recent, kUnbounded);
  if (!a.q.is_cuda) check_values(a, p);
  return p;
}

std::tuple<Array, Array, Array> indexer_topk_select(const IndexerTopkSelectArgs& a) {
  IndexerParams p = make_params(a);
  const std::vector<int64_t> rows(a.q.sizes.begin(), a.q.sizes.end() - 2);
  std::vector<int64_t> lists = rows;
  lists.push_back(p.topk);
  Array indices = empty(lists, a.q, ScalarType::Int);
  Array counts = empty(rows, a.q, ScalarType::Int);
  Array values = empty(a.return_values ? lists : std::vector<int64_t>{0}, a.q, ScalarType::Float);
  p.indices = indices.mutable_data<int32_t>();
  p.counts = counts.mutable_data<int32_t>();
  p.values = a.return_values ? values.mutable_data<float>() : nullptr;
  if (p.tokens > 0 && p.k.rows > 0 && p.batch > 0) {
    run(p, a.q);
  } else {  // empty lists
    fill(-1, indices);
    fill(0, counts);
    fill(-std::numeric_limits<double>::infinity(), values);
  }
  return {indices, counts, values};
}

const Registration kOperators({&implement<indexer_topk_select>("indexer_topk_select")});

}  // namespace
}  // namespace tokenmill
