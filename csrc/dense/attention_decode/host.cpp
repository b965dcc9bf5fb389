#include "core/kv_cache_checks.h"
#include "core/stream.h"
#include "dense/attention_decode/params.h"
#include "dense/score_mod.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention_decode";
constexpr int64_t kMaxSplits = 1024;

void run(DecodeParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
#endif
  cpu::attention_decode(p);
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
  int64_t window_left, num_splits;
  std::string_view schedule;
};

// The checks are those of python/tokenmill/dense/attention_decode.py, in its order and words.
std::tuple<Array, Array> attention_decode(const AttentionDecodeArgs& a) {
  check_cache(kOp, a.q, a.k_cache, a.v_cache, bool(a.block_table));
  const ScoreMap map = map_of(kOp, a.kind);
  const Normalize normalize = normalize_of(kOp, a.normalize, map);
  check_scale(kOp, scale_of(a), a.softcap);
  check(a.window_left >= -1, kOp, "window", "left must be >= -1 (-1 = no limit)", a.window_left);
  check(a.num_splits >= 0 && a.num_splits <= kMaxSplits, kOp, "num_splits",
        Rule("must be 0 (automatic) to ", kMaxSplits), a.num_splits);
  check(a.schedule == "auto" || a.schedule == "split" || a.schedule == "stream_k", kOp, "schedule",
        "must be 'auto', 'split' or 'stream_k'", a.schedule);
  check(a.num_splits == 0 || a.schedule != "stream_k", kOp, "schedule",
        Rule("must be 'auto' or 'split' with num_splits ", a.num_splits), a.schedule);
  DecodeParams d{};
  d.cache = make_cache(kOp, a.q, a.k_cache, a.v_cache, a.seqlens_k, a.block_table);
  d.num_splits = a.num_splits;
  d.stream_k = a.num_splits == 0 && a.schedule != "split";
  AttentionParams& p = d.attention;
  p.batch = a.q.size(0);
  p.seqlen_q = a.q.size(1);
  p.heads = a.q.size(2);
  p.kv_heads = a.k_cache.size(2);
  p.head_dim = a.q.size(3);
  p.value_dim = a.v_cache.size(3);
  p.dtype = to_dtype(a.q.dtype);
  p.map = map;
  p.normalize = normalize;
  p.q = rows_of(a.q, false);
  p.scale = static_cast<float>(scale_of(a));
  p.softcap = static_cast<float>(a.softcap);
  p.score_bias_value = static_cast<float>(a.score_bias_value);
  p.score_bias_neg_log_n = a.score_bias_neg_log_n;
  p.window_left = a.window_left;
  set_score_mod(kOp, p, a.q, a.kind, a.score_bias, a.alibi_slopes, a.sink);
  const int64_t room = a.k_cache.size(1) * (a.block_table ? a.block_table.size(1) : 1);
  set_mask(kOp, p, a.q, room, true, a.mask_ranges, a.mask_q_spans, a.mask_k_spans);
  check_cache_values(kOp, a.q, a.k_cache, d.cache);

  Array out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, a.q);
  const bool statistic = has_row_statistic(p);
  Array lse = empty(statistic ? std::vector{p.batch, p.heads, p.seqlen_q} : std::vector<int64_t>{0},
                    a.q, ScalarType::Float);
  p.out = rows_of(out, false);
  p.lse = statistic ? lse.mutable_data<float>() : nullptr;
  if (out.numel() > 0) run(d, a.q);
  return {out, lse};
}

const Registration kOperators({&implement<attention_decode>("attention_decode")});

}  // namespace
}  // namespace tokenmill
