#include <cmath>
#include <limits>

#include "core/qkv.h"
#include "core/stream.h"
#include "select/checks.h"
#include "select/kv_block_scores/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "kv_block_scores";

HeadReduce to_head_reduce(const std::string& name) {
  constexpr std::pair<const char*, HeadReduce> kAll[] = {
      {"none", HeadReduce::none},
      {"group_max", HeadReduce::group_max},
      {"group_mean", HeadReduce::group_mean},
      {"softmax_vote", HeadReduce::softmax_vote}};
  for (const auto& [text, value] : kAll)
    if (name == text) return value;
  fail(kOp, "head_reduce", "must be 'none', 'group_max', 'group_mean' or 'softmax_vote'",
       show(name));
}

void run(BlockScoreParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, q.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, q, p);
  }
#endif
  cpu::kv_block_scores(p);
}

// The checks are those of python/tokenmill/select/kv_block_scores.py, in its order and words.
Tensor kv_block_scores(Tensor q, Tensor k, std::string scoring, int64_t block_k,
                       std::string q_reduce, int64_t block_q, std::string head_reduce, double scale,
                       bool causal, int64_t num_sink, int64_t num_recent, OptTensor lengths,
                       OptTensor block_table) {
  const View qv(q), kv(k);
  const bool boxes = scoring == "minmax", raw = scoring == "max_block";
  check(scoring == "dot" || boxes || raw, kOp, "scoring", "must be 'dot', 'minmax' or 'max_block'",
        scoring);
  check(qv.dim() == 4, kOp, "q", "must have 4 dimensions [B, S, H, D]", qv.dim());
  check(kv.dim() == (boxes ? 5 : 4), kOp, "k",
        boxes ? "must have 5 dimensions [B, N, H, 2, D] or [pages, page_size, H, 2, D]"
              : "must have 4 dimensions [B, N, H, D] or [pages, page_size, H, D]",
        kv.dim());
  check(is_kernel_dtype(qv.dtype), kOp, "q", "must be float16, bfloat16 or float32", qv.dtype);
  check(kv.dtype == qv.dtype, kOp, "k", Rule("must have the dtype of q, ", qv.dtype), kv.dtype);
  check_device_of(kOp, "k", kv, "q", qv);
  check_last_contiguous(kOp, "q", qv);
  check_last_contiguous(kOp, "k", kv);
  const int64_t dim = qv.size(3);
  check(dim >= 1 && dim <= kMaxHeadDim, kOp, "q",
        Rule("must have a head dimension of 1 to ", kMaxHeadDim), dim);
  check(kv.size(-1) == dim, kOp, "k", Rule("must have the head dimension of q, ", dim),
        kv.size(-1));
  if (boxes)
    check(kv.size(3) == 2, kOp, "k", "must have 2 rows for each block, minimum and maximum",
          kv.size(3));
  const int64_t heads = qv.size(2), kv_heads = kv.size(2);
  check(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0), kOp, "k",
        Rule("number of heads must divide that of q, ", heads, " (GQA)"), kv_heads);
  check_block_table(kOp, block_table, kv);
  const int64_t batch = batch_of(kv, block_table);
  check(batch == qv.size(0), kOp, block_table ? "block_table" : "k",
        Rule("must have the batch size of q, ", qv.size(0)), batch);
  for (const auto& [name, size] : {std::pair{"block_k", block_k}, std::pair{"block_q", block_q}})
    check(size >= 1 && size < (int64_t{1} << 31), kOp, name, "must be 1 to 2^31 - 1", size);
  check(q_reduce == "none" || q_reduce == "mean" || q_reduce == "max", kOp, "q_reduce",
        "must be 'none', 'mean' or 'max'", q_reduce);
  if (q_reduce == "none")
    check(block_q == 1, kOp, "block_q", "must be 1 with q_reduce 'none'", block_q);
  BlockScoreParams p{};
  p.head_reduce = to_head_reduce(head_reduce);
  check(std::isfinite(scale), kOp, "scale", "must be finite", scale);
  check(num_sink >= 0, kOp, "num_sink", "must not be negative", num_sink);
  check(num_recent >= 0, kOp, "num_recent", "must not be negative", num_recent);
  p.lengths = per_request(kOp, "lengths", lengths, batch, "k", kv);
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = dim;
  p.queries = qv.size(1);
  p.block_q = std::clamp<int64_t>(p.queries, 1, block_q);
  p.rows = ceil_div(p.queries, p.block_q);
  p.k = key_rows(kv, block_table);
  p.k_half = boxes ? kv.step(3) : 0;
  p.block_rows = raw ? std::clamp<int64_t>(p.k.rows, 1, block_k) : 1;
  p.row_tokens = raw ? 1 : block_k;
  p.blocks = ceil_div(p.k.rows, p.block_rows);
  p.boxes = boxes;
  p.mean_q = q_reduce == "mean";
  p.causal = causal;
  p.dtype = to_dtype(qv.dtype);
  p.scale = static_cast<float>(scale);
  p.q = rows_of(qv, false);
  p.num_sink = num_sink;
  p.num_recent = num_recent;
  if (!qv.is_cuda && p.k.table) {
    std::vector<int32_t> used(batch);
    for (int64_t b = 0; b < batch; ++b)
      used[b] = static_cast<int32_t>(
          std::min<int64_t>(ceil_div(tokens_of(p, b), p.row_tokens), 0x7fffffff));
    check_block_table_values(kOp, p.k, batch, used.data());
  }
  const bool votes = p.head_reduce == HeadReduce::softmax_vote;
  const int64_t out_heads = votes ? 1 : reduces_group(p) ? kv_heads : heads;
  const auto scores_of = [&](int64_t of_heads) {
    return empty({batch, of_heads, p.rows, p.blocks}, q, ScalarType::Float);
  };
  Tensor out = scores_of(out_heads);
  p.out = static_cast<float*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
  if (heads == 0 && !votes) {  // nothing scores the keys
    torch::stable::fill_(out, -std::numeric_limits<double>::infinity());
    return out;
  }
  if (votes) {
    Tensor scores = scores_of(heads);
    p.scores = static_cast<float*>(scores.mutable_data_ptr());
    run(p, qv);
  } else {
    run(p, qv);
  }
  return out;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("kv_block_scores", TOKENMILL_BOX(kv_block_scores)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("kv_block_scores", TOKENMILL_BOX(kv_block_scores)); }
#endif

}  // namespace tokenmill
