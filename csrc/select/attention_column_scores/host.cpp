#include <cmath>

#include "core/qkv.h"
#include "core/stream.h"
#include "select/attention_column_scores/params.h"
#include "select/checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention_column_scores";

void run(ColumnScoresParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, q.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, q, p);
  }
#endif
  cpu::attention_column_scores(p);
}

// The checks are those of python/tokenmill/select/column_scores.py, in its order and words.
Tensor attention_column_scores(Tensor q, Tensor k, OptTensor lse, double scale, bool causal,
                               std::string reduce, std::optional<int64_t> window_queries,
                               std::string head_reduce, OptTensor lengths, OptTensor query_lengths,
                               double gumbel_tau, int64_t seed) {
  const View qv(q), kv(k);
  check_qkv(kOp, qv, kv, kv, 4);
  ColumnScoresParams p{};
  p.batch = qv.size(0);
  p.seqlen_q = qv.size(1);
  p.heads = qv.size(2);
  p.head_dim = qv.size(3);
  p.seqlen_k = kv.size(1);
  p.kv_heads = kv.size(2);
  p.dtype = to_dtype(qv.dtype);
  p.q = rows_of(qv, false);
  p.k = rows_of(kv, false);
  set_lse(kOp, lse, qv, p);
  if (lse) check(gumbel_tau == 0, kOp, "lse", "goes without gumbel_tau", View(*lse).sizes);
  check(std::isfinite(scale), kOp, "scale", "must be finite", scale);
  check(reduce == "sum" || reduce == "mean" || reduce == "visible_mean", kOp, "reduce",
        "must be 'sum', 'mean' or 'visible_mean'", reduce);
  check(!window_queries || *window_queries >= 1, kOp, "window_queries", "must be at least 1",
        window_queries.value_or(0));
  check(head_reduce == "none" || head_reduce == "group_mean" || head_reduce == "group_max", kOp,
        "head_reduce", "must be 'none', 'group_mean' or 'group_max'", head_reduce);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.reduce = reduce == "sum"    ? ColumnReduce::sum
             : reduce == "mean" ? ColumnReduce::mean
                                : ColumnReduce::visible_mean;
  p.head_reduce = head_reduce == "none"         ? HeadReduce::none
                  : head_reduce == "group_mean" ? HeadReduce::group_mean
                                                : HeadReduce::group_max;
  p.window_queries = std::min(window_queries.value_or(p.seqlen_q), p.seqlen_q);
  p.lengths = per_request(kOp, "lengths", lengths, p.batch, "k", kv);
  p.query_lengths = per_request(kOp, "query_lengths", query_lengths, p.batch, "k", kv);
  check(std::isfinite(gumbel_tau) && gumbel_tau >= 0, kOp, "gumbel_tau",
        "must be finite and not negative (0 = off)", gumbel_tau);
  check(seed >= 0, kOp, "seed", "must be 0 to 2^63 - 1", seed);
  if (!qv.is_cuda) {
    check_length_values(kOp, "lengths", p.lengths, p.batch, p.seqlen_k);
    check_length_values(kOp, "query_lengths", p.query_lengths, p.batch, p.seqlen_q);
  }
  p.inverse_tau = gumbel_tau > 0 ? static_cast<float>(1 / gumbel_tau) : 0;
  p.seed = static_cast<uint64_t>(seed);
  const std::vector<int64_t> sizes{
      p.batch, p.head_reduce == HeadReduce::none ? p.heads : p.kv_heads, p.seqlen_k};
  if (p.heads == 0) return torch::stable::new_zeros(q, sizes, ScalarType::Float);
  Tensor out = empty(sizes, q, ScalarType::Float);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() > 0) run(p, qv);
  return out;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("attention_column_scores", TOKENMILL_BOX(attention_column_scores));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("attention_column_scores", TOKENMILL_BOX(attention_column_scores));
}
#endif

}  // namespace tokenmill
