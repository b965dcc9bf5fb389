#include <cmath>

#include "core/qkv.h"
#include "core/stream.h"
#include "select/attention_row_scores/params.h"
#include "select/checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention_row_scores";

void run(RowScoresParams& p, const View& q) {
  const int64_t rows = p.batch * p.heads * p.rows;
  Tensor exponents = empty({rows * p.seqlen_k}, q.tensor, ScalarType::Float);
  p.exponents = static_cast<float*>(exponents.mutable_data_ptr());
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) {
    Tensor statistics = empty({2 * rows}, q.tensor, ScalarType::Float);
    p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
    return launch_on_device(kOp, q, p);
  }
#endif
  cpu::attention_row_scores(p);
}

// The checks are those of python/tokenmill/select/row_scores.py, in its order and words.
Tensor attention_row_scores(Tensor q, Tensor k, OptTensor lse, double scale, bool causal,
                            std::string reduce, int64_t skip, OptTensor lengths) {
  const View qv(q), kv(k);
  check_qkv(kOp, qv, kv, kv, 4);
  RowScoresParams p{};
  p.batch = qv.size(0);
  p.rows = qv.size(1);
  p.heads = qv.size(2);
  p.head_dim = qv.size(3);
  p.seqlen_k = kv.size(1);
  p.kv_heads = kv.size(2);
  p.dtype = to_dtype(qv.dtype);
  p.q = rows_of(qv, false);
  p.k = rows_of(kv, false);
  set_lse(kOp, lse, qv, p);
  check(std::isfinite(scale), kOp, "scale", "must be finite", scale);
  check(reduce == "none" || reduce == "sum" || reduce == "mean" || reduce == "max", kOp, "reduce",
        "must be 'none', 'sum', 'mean' or 'max'", reduce);
  check(skip >= 0 && skip <= p.seqlen_k, kOp, "skip",
        Rule("must be 0 to the number of keys, ", p.seqlen_k), skip);
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.reduce = reduce == "none"   ? RowReduce::none
             : reduce == "sum"  ? RowReduce::sum
             : reduce == "mean" ? RowReduce::mean
                                : RowReduce::max;
  p.skip = skip;
  p.lengths = per_request(kOp, "lengths", lengths, p.batch, "k", kv);
  if (!qv.is_cuda) check_length_values(kOp, "lengths", p.lengths, p.batch, p.seqlen_k);
  const std::vector<int64_t> sizes =
      p.reduce == RowReduce::none
          ? std::vector<int64_t>{p.batch, p.heads, p.rows, p.seqlen_k - skip}
          : std::vector<int64_t>{p.batch, p.seqlen_k - skip};
  if (p.heads * p.rows == 0) return torch::stable::new_zeros(q, sizes, ScalarType::Float);
  Tensor out = empty(sizes, q, ScalarType::Float);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() > 0) run(p, qv);
  return out;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("attention_row_scores", TOKENMILL_BOX(attention_row_scores)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("attention_row_scores", TOKENMILL_BOX(attention_row_scores)); }
#endif

}  // namespace tokenmill
