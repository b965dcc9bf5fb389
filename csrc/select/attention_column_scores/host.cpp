#include <cmath>

#include "core/qkv.h"
#include "core/stream.h"
#include "select/attention_column_scores/params.h"
#include "select/checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention_column_scores";

constexpr std::pair<std::string_view, ColumnReduce> kReduces[] = {
    {"sum", ColumnReduce::sum},
    {"mean", ColumnReduce::mean},
    {"visible_mean", ColumnReduce::visible_mean}};
constexpr std::pair<std::string_view, HeadReduce> kHeadReduces[] = {
    {"none", HeadReduce::none},
    {"group_mean", HeadReduce::group_mean},
    {"group_max", HeadReduce::group_max}};

void run(ColumnScoresParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  cpu::attention_column_scores(p);
}

struct AttentionColumnScoresArgs : Record {
  View q, k, lse;
  Optional<double> scale;
  bool causal;
  std::string_view reduce;
  Optional<int64_t> window_queries;
  std::string_view head_reduce;
  View seqlens_k, seqlens_q;
  double gumbel_tau;
  int64_t seed;
};

Array attention_column_scores(const AttentionColumnScoresArgs& a) {
  check_qkv(kOp, a.q, a.k, a.k, 4);
  ColumnScoresParams p{};
  p.batch = a.q.size(0);
  p.seqlen_q = a.q.size(1);
  p.heads = a.q.size(2);
  p.head_dim = a.q.size(3);
  p.seqlen_k = a.k.size(1);
  p.kv_heads = a.k.size(2);
  p.dtype = to_dtype(a.q.dtype);
  p.q = rows_of(a.q, false);
  p.k = rows_of(a.k, false);
  set_lse(kOp, a.lse, a.q, p);
  if (a.lse) check(a.gumbel_tau == 0, kOp, "lse", "must not be given with gumbel_tau", a.lse.sizes);
  check_scale(kOp, scale_of(a));
  p.reduce = choose(kOp, "reduce", kReduces, a.reduce);
  check(!a.window_queries || *a.window_queries >= 1, kOp, "window_queries", "must be at least 1",
        a.window_queries.value_or(0));
  p.head_reduce = choose(kOp, "head_reduce", kHeadReduces, a.head_reduce);
  p.scale = static_cast<float>(scale_of(a));
  p.causal = a.causal;
  p.window_queries = std::min(a.window_queries.value_or(p.seqlen_q), p.seqlen_q);
  p.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, p.batch, "k", a.k);
  p.query_lengths = per_request(kOp, "seqlens_q", a.seqlens_q, p.batch, "k", a.k);
  check(std::isfinite(a.gumbel_tau) && a.gumbel_tau >= 0, kOp, "gumbel_tau",
        "must be finite and not negative (0 = off)", a.gumbel_tau);
  check(a.seed >= 0, kOp, "seed", "must be 0 to 2^63 - 1", a.seed);
  if (!a.q.is_cuda) {
    check_length_values(kOp, "seqlens_k", p.lengths, p.batch, p.seqlen_k);
    check_length_values(kOp, "seqlens_q", p.query_lengths, p.batch, p.seqlen_q);
  }
  p.inverse_tau = a.gumbel_tau > 0 ? static_cast<float>(1 / a.gumbel_tau) : 0;
  p.seed = static_cast<uint64_t>(a.seed);
  const std::vector<int64_t> sizes{
      p.batch, p.head_reduce == HeadReduce::none ? p.heads : p.kv_heads, p.seqlen_k};
  if (p.heads == 0) return zeros(sizes, a.q, ScalarType::Float);
  Array out = empty(sizes, a.q, ScalarType::Float);
  p.out = out.mutable_data<float>();
  if (out.numel() > 0) run(p, a.q);
  return out;
}

const Registration kOperators({&implement<attention_column_scores>("attention_column_scores")});

}  // namespace
}  // namespace tokenmill
