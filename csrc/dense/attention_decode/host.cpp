#include <algorithm>
#include <map>
#include <vector>

#include "attention/score_mod.h"
#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "core/written.h"
#include "dense/attention_decode/kernels.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention_decode";
constexpr int64_t kMaxSplits = 1024;

// Max query rows per key for which keys are read in place; more rows share packed keys.
constexpr int64_t kFewRows = 64;

bool packs_keys(const AttentionParams& p) {
  return std::max(p.head_dim, p.value_dim) <= kMaxHeadDim;
}

// The result of a request depends only on its own number of queries, if invariant not even on it.
void run_on_cpu(DecodeParams& d, bool invariant) {
  const AttentionParams& p = d.attention;
  if (invariant) {
    d.num_requests = p.batch;
    d.queries = p.seqlen_q;
    return cpu::attention_prefill(d);
  }
  const bool packs = packs_keys(p);
  const int64_t few = packs ? kFewRows / (p.heads / p.kv_heads) : p.seqlen_q;
  if (!p.cu_seqlens_q) {
    d.num_requests = p.batch;
    d.queries = p.seqlen_q;
    return d.queries <= few || d.queries == 1 ? cpu::attention_decode(d)
                                              : cpu::attention_prefill(d);
  }
  std::map<int64_t, std::vector<int32_t>> by_queries;
  constexpr int64_t kMany = 0;  // a request without queries has nothing to compute
  for (int32_t b = 0; b < p.batch; ++b) {
    const int64_t n = p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
    if (n > 0) by_queries[n <= few || n == 1 ? n : kMany].push_back(b);
  }
  for (const auto& [queries, requests] : by_queries) {
    d.requests = requests.data();
    d.num_requests = static_cast<int64_t>(requests.size());
    d.queries = queries;
    queries == kMany ? cpu::attention_prefill(d) : cpu::attention_decode(d);
  }
}

struct AttentionDecodeArgs : Record {
  View q, k_cache, v_cache, seqlens_k, block_table;
  std::string_view kind, normalize;
  Optional<double> scale;
  View score_bias;
  double score_bias_value;
  bool score_bias_neg_log_n;
  View mask_ranges, mask_q_spans, mask_k_spans, alibi_slopes, sink;
  double softcap;
  bool causal;
  int64_t window_left, window_right;
  View cu_seqlens_q;
  Optional<int64_t> max_seqlen_q;
  int64_t num_splits;
  std::string_view schedule;
  View k_scale, v_scale;
  bool invariant;

  bool packed() const { return bool(cu_seqlens_q); }
};

DecodeParams make_params(const AttentionDecodeArgs& a) {
  const int64_t batch =
      check_cache(kOp, a.q, a.k_cache, a.v_cache, bool(a.block_table), a.cu_seqlens_q);
  const ScoreMap map = map_of(kOp, a.kind);
  const Normalize normalize = normalize_of(kOp, a.normalize, map);
  check_scale(kOp, scale_of(a), a.softcap);
  check(a.window_left >= -1, kOp, "window", "left must be >= -1 (-1 = no limit)", a.window_left);
  check(a.window_right >= -1, kOp, "window", "right must be >= -1 (-1 = no limit)", a.window_right);
  if (a.max_seqlen_q) {
    check(a.packed(), kOp, "max_seqlen_q", "requires cu_seqlens_q", *a.max_seqlen_q);
    check(*a.max_seqlen_q >= 0, kOp, "max_seqlen_q", "must not be negative", *a.max_seqlen_q);
  }
  check(a.num_splits >= 0 && a.num_splits <= kMaxSplits, kOp, "num_splits",
        Rule("must be 0 (automatic) to ", kMaxSplits), a.num_splits);
  check(a.schedule == "auto" || a.schedule == "split" || a.schedule == "stream_k", kOp, "schedule",
        "must be 'auto', 'split' or 'stream_k'", a.schedule);
  check(a.num_splits == 0 || a.schedule != "stream_k", kOp, "schedule",
        Rule("must be 'auto' or 'split' with num_splits ", a.num_splits), a.schedule);
  DecodeParams d{};
  d.cache = make_cache(kOp, a.q, batch, a.k_cache, a.v_cache, a.seqlens_k, a.block_table, a.k_scale,
                       a.v_scale);
  d.num_splits = a.num_splits;
  d.stream_k = a.num_splits == 0 && a.schedule != "split";
  AttentionParams& p = d.attention;
  p.batch = batch;
  p.seqlen_q = a.q.size(a.packed() ? 0 : 1);
  d.max_seqlen_q = a.max_seqlen_q ? *a.max_seqlen_q : p.seqlen_q;
  p.heads = a.q.size(-2);
  p.kv_heads = a.k_cache.size(2);
  p.head_dim = a.q.size(-1);
  p.value_dim = a.v_cache.size(3);
  check(!a.invariant || packs_keys(p), kOp, "invariant",
        Rule("must be False with head dimensions above ", kMaxHeadDim), a.invariant);
  p.dtype = to_dtype(a.q.dtype);
  p.map = map;
  p.normalize = normalize;
  p.q = rows_of(a.q, a.packed());
  if (a.packed()) p.cu_seqlens_q = a.cu_seqlens_q.data<int32_t>();
  p.scale = static_cast<float>(scale_of(a));
  p.softcap = static_cast<float>(a.softcap);
  p.score_bias_value = static_cast<float>(a.score_bias_value);
  p.score_bias_neg_log_n = a.score_bias_neg_log_n;
  p.window_left = a.window_left;
  p.window_right = a.causal ? 0 : a.window_right;
  set_score_mod(kOp, p, a.q, a.kind, a.score_bias, a.alibi_slopes, a.sink);
  for (auto [name, spans] :
       {std::pair{"mask_q_spans", &a.mask_q_spans}, std::pair{"mask_k_spans", &a.mask_k_spans}})
    check(!a.packed() || !*spans, kOp, name, "must not be given with cu_seqlens_q", spans->sizes);
  const int64_t room = a.k_cache.size(1) * (a.block_table ? a.block_table.size(1) : 1);
  // rows of k_spans, which may exceed the capacity
  p.seqlen_k = a.mask_k_spans && a.mask_k_spans.dim() == 3 ? a.mask_k_spans.size(1) : room;
  set_mask(kOp, p, a.q, room, true, a.mask_ranges, a.mask_q_spans, a.mask_k_spans);
  return d;
}

void check_values(const AttentionDecodeArgs& a, const DecodeParams& d) {
  const AttentionParams& p = d.attention;
  if (a.packed() && !a.q.is_cuda)
    check_cu_seqlens_values(kOp, "cu_seqlens_q", a.cu_seqlens_q, p.seqlen_q, "max_seqlen_q",
                            a.max_seqlen_q);
  check_cache_values(kOp, a.k_cache, p.batch, d.cache);
}

std::vector<int64_t> out_sizes(const AttentionDecodeArgs& a) {
  std::vector<int64_t> sizes = a.q.sizes;
  sizes.back() = a.v_cache.size(3);
  return sizes;
}

void run(DecodeParams& d, const AttentionDecodeArgs& a) {
  if (!a.q.is_cuda) return run_on_cpu(d, a.invariant);
  check(!a.invariant, kOp, "invariant", "must be False on a GPU", a.invariant);
  launch_with_workspace(kOp, a.q, d, d.workspace);
}

// Writes out; returns lse.
Array answer(DecodeParams& d, const AttentionDecodeArgs& a, const View& out) {
  AttentionParams& p = d.attention;
  out.note(true);
  p.out = rows_of(out, a.packed());
  Array lse = empty(lse_sizes(p), a.q, ScalarType::Float);
  p.lse = has_row_statistic(p) ? lse.mutable_data<float>() : nullptr;
  if (out.numel() > 0) run(d, a);
  return lse;
}

std::tuple<Array, Array> attention_decode(const AttentionDecodeArgs& a) {
  DecodeParams d = make_params(a);
  check_values(a, d);
  Array out = empty(out_sizes(a), a.q);
  Array lse = answer(d, a, out);
  return {out, lse};
}

struct AttentionDecodeOutArgs : Record {
  AttentionDecodeArgs forward;
  View out;
};

Array attention_decode_out(const AttentionDecodeOutArgs& a) {
  const AttentionDecodeArgs& in = a.forward;
  DecodeParams d = make_params(in);
  check_like_out(kOp, "out", a.out, out_sizes(in), in.q);
  check_written(kOp, a);
  check_values(in, d);
  return answer(d, in, a.out);
}

const Registration kOperators({&implement<attention_decode>("attention_decode"),
                               &implement<attention_decode_out>("attention_decode_out")});

}  // namespace
}  // namespace tokenmill
