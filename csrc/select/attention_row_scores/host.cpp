#include "core/qkv.h"
#include "core/stream.h"
#include "select/attention_row_scores/params.h"
#include "select/checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention_row_scores";

void run(RowScoresParams& p, const View& q) {
  const int64_t rows = p.batch * p.heads * p.rows;
  Array exponents = empty({rows * p.seqlen_k}, q, ScalarType::Float);
  p.exponents = exponents.mutable_data<float>();
  if (q.is_cuda) {
    Array statistics = empty({2 * rows}, q, ScalarType::Float);
    p.statistics = statistics.mutable_data<float>();
    return launch_on_device(kOp, q, p);
  }
  cpu::attention_row_scores(p);
}

struct AttentionRowScoresArgs : Record {
  View q, k, lse;
  Optional<double> scale;
  bool causal;
  std::string_view reduce;
  int64_t skip;
  View seqlens_k;
};

constexpr std::pair<std::string_view, RowReduce> kReduces[] = {{"none", RowReduce::none},
                                                               {"sum", RowReduce::sum},
                                                               {"mean", RowReduce::mean},
                                                               {"max", RowReduce::max},
                                                               {"argmax", RowReduce::argmax}};

Array attention_row_scores(const AttentionRowScoresArgs& a) {
  check_qkv(kOp, a.q, a.k, a.k, 4);
  RowScoresParams p{};
  p.batch = a.q.size(0);
  p.rows = a.q.size(1);
  p.heads = a.q.size(2);
  p.head_dim = a.q.size(3);
  p.seqlen_k = a.k.size(1);
  p.kv_heads = a.k.size(2);
  p.dtype = to_dtype(a.q.dtype);
  p.q = rows_of(a.q, false);
  p.k = rows_of(a.k, false);
  set_lse(kOp, a.lse, a.q, p);
  check_scale(kOp, scale_of(a));
  p.reduce = choose(kOp, "reduce", kReduces, a.reduce);
  check(a.skip >= 0 && a.skip <= p.seqlen_k, kOp, "skip",
        Rule("must be 0 to the number of keys, ", p.seqlen_k), a.skip);
  p.scale = static_cast<float>(scale_of(a));
  p.causal = a.causal;
  p.skip = a.skip;
  p.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, p.batch, "k", a.k);
  if (!a.q.is_cuda) check_length_values(kOp, "seqlens_k", p.lengths, p.batch, p.seqlen_k);
  if (p.reduce == RowReduce::argmax) {
    Array largest = empty({p.batch, p.heads, p.rows}, a.q, ScalarType::Int);
    p.largest = largest.mutable_data<int32_t>();
    if (largest.numel() > 0) run(p, a.q);
    return largest;
  }
  const std::vector<int64_t> sizes =
      p.reduce == RowReduce::none
          ? std::vector<int64_t>{p.batch, p.heads, p.rows, p.seqlen_k - a.skip}
          : std::vector<int64_t>{p.batch, p.seqlen_k - a.skip};
  if (p.heads * p.rows == 0) return zeros(sizes, a.q, ScalarType::Float);
  Array out = empty(sizes, a.q, ScalarType::Float);
  p.out = out.mutable_data<float>();
  if (out.numel() > 0) run(p, a.q);
  return out;
}

const Registration kOperators({&implement<attention_row_scores>("attention_row_scores")});

}  // namespace
}  // namespace tokenmill
