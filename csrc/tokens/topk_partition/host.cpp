#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/topk_partition/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "topk_partition";

void run(TopkPartitionParams& p, const View& scores) {
#if defined(TOKENMILL_WITH_CUDA)
  if (scores.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, scores.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, scores, p);
  }
#endif
  cpu::topk_partition(p);
}

// The checks are those of python/tokenmill/tokens/topk_partition.py, in its order and words.
std::tuple<Tensor, Tensor> topk_partition(Tensor scores, int64_t k, OptTensor counts, bool largest,
                                          std::string order, OptTensor valid, int64_t protect_first,
                                          int64_t protect_last) {
  const View s(scores);
  check(s.dim() == 2, kOp, "scores", "must have 2 dimensions [B, N]", s.dim());
  check(is_kernel_dtype(s.dtype), kOp, "scores", "must be float16, bfloat16 or float32", s.dtype);
  check_last_contiguous(kOp, "scores", s);
  TopkPartitionParams p{};
  p.batch = s.size(0);
  p.tokens = s.size(1);
  p.k = k;
  check(p.tokens < int64_t{1} << 31, kOp, "scores", "must have fewer than 2^31 tokens in a row",
        p.tokens);
  const char* const most = counts ? "max_k" : "k";
  check(k >= 0 && k <= p.tokens, kOp, most, Rule("must be 0 to N, ", p.tokens), k);
  const std::optional<View> c = counts ? std::optional<View>(*counts) : std::nullopt;
  if (c) {
    check_like(kOp, "k", *c, {p.batch}, ScalarType::Int, "scores", s);
    p.counts = c->data<int32_t>();
  }
  check(order == "score" || order == "index", kOp, "order", "must be 'score' or 'index'", order);
  const std::optional<View> v = valid ? std::optional<View>(*valid) : std::nullopt;
  if (v) {
    check_like(kOp, "valid", *v, s.sizes, ScalarType::Bool, "scores", s);
    p.valid = v->data<bool>();
    p.valid_batch = v->step(0);
  }
  check(protect_first >= 0, kOp, "protect_first", "must not be negative", protect_first);
  check(protect_last >= 0, kOp, "protect_last", "must not be negative", protect_last);
  check(protect_first <= k && protect_last <= k - protect_first, kOp, "protect_last",
        Rule("must leave protect_first + protect_last <= ", most, ", ", k, ", with protect_first ",
             protect_first),
        protect_last);
  for (int64_t b = 0; c && !s.is_cuda && b < p.batch; ++b)
    check(p.counts[b] >= protect_first + protect_last && p.counts[b] <= k, kOp, "k",
          Rule("must be ", protect_first + protect_last, " to ", k), int64_t{p.counts[b]});
  p.dtype = to_dtype(s.dtype);
  p.scores = s.data();
  p.scores_batch = s.step(0);
  p.largest = largest;
  p.by_score = order == "score";
  p.protect_first = protect_first;
  p.protect_last = protect_last;
  Tensor keep = empty({p.batch, k}, scores, ScalarType::Int);
  p.others = c ? p.tokens : p.tokens - k;
  Tensor rest = empty({p.batch, p.others}, scores, ScalarType::Int);
  p.keep = static_cast<int32_t*>(keep.mutable_data_ptr());
  p.rest = static_cast<int32_t*>(rest.mutable_data_ptr());
  if (p.batch * p.tokens > 0) run(p, s);
  return {keep, rest};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("topk_partition", TOKENMILL_BOX(topk_partition)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("topk_partition", TOKENMILL_BOX(topk_partition)); }
#endif

}  // namespace tokenmill
