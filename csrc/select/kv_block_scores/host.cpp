#include <limits>

#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "select/checks.h"
#include "select/kv_block_scores/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "kv_block_scores";

constexpr std::pair<std::string_view, HeadReduce> kHeadReduces[] = {
    {"none", HeadReduce::none},
    {"group_max", HeadReduce::group_max},
    {"group_mean", HeadReduce::group_mean},
    {"softmax_vote", HeadReduce::softmax_vote}};

void run(BlockScoreParams& p, const View& q, const View& k) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  cpu::kv_block_scores(p);
}

struct KvBlockScoresArgs : Record {
  View q, k;
  std::string_view scoring;
  int64_t block_k;
  std::string_view q_reduce;
  int64_t block_q;
  std::string_view head_reduce;
  Optional<double> scale;
  bool causal;
  int64_t num_sink, num_recent;
  View seqlens_k, block_table, k_scale;
};

Array kv_block_scores(const KvBlockScoresArgs& a) {
  const bool boxes = a.scoring == "minmax", raw = a.scoring == "max_block";
  check(a.scoring == "dot" || boxes || raw, kOp, "scoring",
        "must be 'dot', 'minmax' or 'max_block'", a.scoring);
  check(a.q.dim() == 4, kOp, "q", "must have 4 dimensions [B, S, H, D]", a.q.dim());
  check(a.k.dim() == (boxes ? 5 : 4), kOp, "k",
        boxes ? "must have 5 dimensions [B, N, H, 2, D] or [pages, page_size, H, 2, D]"
              : "must have 4 dimensions [B, N, H, D] or [pages, page_size, H, D]",
        a.k.dim());
  check_dtype(kOp, "q", a.q);
  if (boxes)
    check(a.k.dtype == a.q.dtype, kOp, "k", Rule("must have the dtype of q, ", a.q.dtype),
          a.k.dtype);
  else
    check_cache_dtype(kOp, "k", a.k, a.q);
  check_device_of(kOp, "k", a.k, "q", a.q);
  check_last_contiguous(kOp, "q", a.q);
  check_last_contiguous(kOp, "k", a.k);
  const int64_t dim = a.q.size(3);
  check_head_dim(kOp, "q", a.q);
  check(a.k.size(-1) == dim, kOp, "k", Rule("must have the head dimension of q, ", dim),
        a.k.size(-1));
  if (boxes)
    check(a.k.size(3) == 2, kOp, "k", "must have 2 rows for each block, minimum and maximum",
          a.k.size(3));
  const int64_t heads = a.q.size(2), kv_heads = a.k.size(2);
  check(heads == kv_heads || (kv_heads > 0 && heads % kv_heads == 0), kOp, "k",
        Rule("number of heads must divide that of q, ", heads, " (GQA)"), kv_heads);
  check_block_table(kOp, a.block_table, a.k);
  const int64_t batch = batch_of(a.k, a.block_table);
  check(batch == a.q.size(0), kOp, a.block_table ? "block_table" : "k",
        Rule("must have the batch size of q, ", a.q.size(0)), batch);
  for (const auto& [name, size] :
       {std::pair{"block_k", a.block_k}, std::pair{"block_q", a.block_q}})
    check(size >= 1 && size < (int64_t{1} << 31), kOp, name, "must be 1 to 2^31 - 1", size);
  check(a.q_reduce == "none" || a.q_reduce == "mean" || a.q_reduce == "max", kOp, "q_reduce",
        "must be 'none', 'mean' or 'max'", a.q_reduce);
  if (a.q_reduce == "none")
    check(a.block_q == 1, kOp, "block_q", "must be 1 with q_reduce 'none'", a.block_q);
  BlockScoreParams p{};
  p.head_reduce = choose(kOp, "head_reduce", kHeadReduces, a.head_reduce);
  check_scale(kOp, scale_of(a));
  check(a.num_sink >= 0, kOp, "num_sink", "must not be negative", a.num_sink);
  check(a.num_recent >= 0, kOp, "num_recent", "must not be negative", a.num_recent);
  p.lengths = per_request(kOp, "seqlens_k", a.seqlens_k, batch, "k", a.k);
  p.k_scale = make_cache_scale(kOp, "k_scale", a.k_scale, "k", a.k);
  p.batch = batch;
  p.heads = heads;
  p.kv_heads = kv_heads;
  p.head_dim = dim;
  p.queries = a.q.size(1);
  p.block_q = std::clamp<int64_t>(p.queries, 1, a.block_q);
  p.rows = ceil_div(p.queries, p.block_q);
  p.k = key_rows(a.k, a.block_table);
  p.k_half = boxes ? a.k.step(3) : 0;
  p.block_rows = raw ? std::clamp<int64_t>(p.k.rows, 1, a.block_k) : 1;
  p.row_tokens = raw ? 1 : a.block_k;
  p.blocks = ceil_div(p.k.rows, p.block_rows);
  p.boxes = boxes;
  p.mean_q = a.q_reduce == "mean";
  p.causal = a.causal;
  p.dtype = to_dtype(a.q.dtype);
  p.k_dtype = to_dtype(a.k.dtype);
  p.scale = static_cast<float>(scale_of(a));
  p.q = rows_of(a.q, false);
  p.num_sink = a.num_sink;
  p.num_recent = a.num_recent;
  if (!a.q.is_cuda && p.k.table) {
    std::vector<int32_t> used(batch);
    for (int64_t b = 0; b < batch; ++b)
      used[b] = static_cast<int32_t>(
          std::min<int64_t>(ceil_div(tokens_of(p, b), p.row_tokens), 0x7fffffff));
    check_block_table_values(kOp, p.k, batch, used.data());
  }
  const bool votes = p.head_reduce == HeadReduce::softmax_vote;
  const int64_t out_heads = votes ? 1 : reduces_group(p) ? kv_heads : heads;
  const auto scores_of = [&](int64_t of_heads) {
    return empty({batch, of_heads, p.rows, p.blocks}, a.q, ScalarType::Float);
  };
  Array out = scores_of(out_heads);
  p.out = out.mutable_data<float>();
  if (out.numel() == 0) return out;
  if (heads == 0 && !votes) {  // no queries
    fill(-std::numeric_limits<double>::infinity(), out);
    return out;
  }
  if (votes) {
    Array scores = scores_of(heads);
    p.scores = scores.mutable_data<float>();
    run(p, a.q, a.k);
  } else {
    run(p, a.q, a.k);
  }
  return out;
}

const Registration kOperators({&implement<kv_block_scores>("kv_block_scores")});

}  // namespace
}  // namespace tokenmill
