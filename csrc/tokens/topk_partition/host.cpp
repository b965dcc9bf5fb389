#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/topk_partition/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "topk_partition";

void run(TopkPartitionParams& p, const View& scores) {
  if (scores.is_cuda) return launch_with_workspace(kOp, scores, p, p.workspace);
  cpu::topk_partition(p);
}

struct TopkPartitionArgs : Record {
  View scores;
  int64_t k;
  View counts;
  bool largest;
  std::string_view order;
  View valid;
  int64_t protect_first, protect_last;
};

std::tuple<Array, Array> topk_partition(const TopkPartitionArgs& a) {
  check(a.scores.dim() == 2, kOp, "scores", "must have 2 dimensions [B, N]", a.scores.dim());
  check_dtype(kOp, "scores", a.scores);
  check_last_contiguous(kOp, "scores", a.scores);
  TopkPartitionParams p{};
  p.batch = a.scores.size(0);
  p.tokens = a.scores.size(1);
  p.k = a.k;
  check(p.tokens < int64_t{1} << 31, kOp, "scores", "must have fewer than 2^31 tokens in a row",
        p.tokens);
  const char* const maximum = a.counts ? "max_k" : "k";
  check(a.k >= 0 && a.k <= p.tokens, kOp, maximum, Rule("must be 0 to N, ", p.tokens), a.k);
  if (a.counts) {
    check_like(kOp, "k", a.counts, {p.batch}, ScalarType::Int, "scores", a.scores);
    p.counts = a.counts.data<int32_t>();
  }
  check(a.order == "score" || a.order == "index", kOp, "order", "must be 'score' or 'index'",
        a.order);
  if (a.valid) {
    check_like(kOp, "valid", a.valid, a.scores.sizes, ScalarType::Bool, "scores", a.scores);
    p.valid = a.valid.data<bool>();
    p.valid_batch = a.valid.step(0);
  }
  check(a.protect_first >= 0, kOp, "protect_first", "must not be negative", a.protect_first);
  check(a.protect_last >= 0, kOp, "protect_last", "must not be negative", a.protect_last);
  check(a.protect_first <= a.k && a.protect_last <= a.k - a.protect_first, kOp, "protect_last",
        Rule("must leave protect_first + protect_last <= ", maximum, ", ", a.k,
             ", with protect_first ", a.protect_first),
        a.protect_last);
  for (int64_t b = 0; a.counts && !a.scores.is_cuda && b < p.batch; ++b)
    check(p.counts[b] >= a.protect_first + a.protect_last && p.counts[b] <= a.k, kOp, "k",
          Rule("must be ", a.protect_first + a.protect_last, " to ", a.k), int64_t{p.counts[b]});
  p.dtype = to_dtype(a.scores.dtype);
  p.scores = a.scores.data();
  p.scores_batch = a.scores.step(0);
  p.largest = a.largest;
  p.by_score = a.order == "score";
  p.protect_first = a.protect_first;
  p.protect_last = a.protect_last;
  Array keep = empty({p.batch, a.k}, a.scores, ScalarType::Int);
  p.others = a.counts ? p.tokens : p.tokens - a.k;
  Array rest = empty({p.batch, p.others}, a.scores, ScalarType::Int);
  p.keep = keep.mutable_data<int32_t>();
  p.rest = rest.mutable_data<int32_t>();
  if (p.batch * p.tokens > 0) run(p, a.scores);
  return {keep, rest};
}

const Registration kOperators({&implement<topk_partition>("topk_partition")});

}  // namespace
}  // namespace tokenmill
