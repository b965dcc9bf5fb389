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
  if (q.is_cuda) {
    const int64_t bytes = (CudaScope(q.device), workspace_bytes(p));
    Tensor workspace = empty({bytes}, q.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, q, p);
  }
#endif
  cpu::attention_decode(p);
}

// The checks are those of python/tokenmill/dense/attention_decode.py, in its order and words.
std::tuple<Tensor, Tensor> attention_decode(Tensor q, Tensor k_cache, Tensor v_cache,
                                            Tensor seqlens_k, OptTensor block_table,
                                            std::string kind, double scale, OptTensor score_bias,
                                            double score_bias_value, bool score_bias_neg_log_n,
                                            OptTensor alibi_slopes, OptTensor sink, double softcap,
                                            int64_t window_left, int64_t num_splits,
                                            std::string schedule) {
  const View qv(q), kv(k_cache), vv(v_cache), lengths(seqlens_k);
  const std::optional<View> table = block_table ? std::optional<View>(*block_table) : std::nullopt;
  check_cache(kOp, qv, kv, vv, table.has_value());
  check_kind(kOp, kind);
  check_scale(kOp, scale, softcap);
  check(window_left >= -1, kOp, "window", "left must be >= -1 (-1 = no limit)", window_left);
  check(num_splits >= 0 && num_splits <= kMaxSplits, kOp, "num_splits",
        Rule("must be 0 (automatic) to ", kMaxSplits), num_splits);
  check(schedule == "auto" || schedule == "split" || schedule == "stream_k", kOp, "schedule",
        "must be 'auto', 'split' or 'stream_k'", schedule);
  check(num_splits == 0 || schedule != "stream_k", kOp, "schedule",
        Rule("must be 'auto' or 'split' with num_splits ", num_splits), schedule);
  DecodeParams d{};
  d.cache = make_cache(kOp, qv, kv, vv, lengths, table);
  d.num_splits = num_splits;
  d.stream_k = num_splits == 0 && schedule != "split";
  AttentionParams& p = d.attention;
  p.batch = qv.size(0);
  p.seqlen_q = qv.size(1);
  p.heads = qv.size(2);
  p.kv_heads = kv.size(2);
  p.head_dim = qv.size(3);
  p.value_dim = vv.size(3);
  p.dtype = to_dtype(qv.dtype);
  p.map = kind == "softmax" ? ScoreMap::softmax : ScoreMap::sigmoid;
  p.q = rows_of(qv, false);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.score_bias_value = static_cast<float>(score_bias_value);
  p.score_bias_neg_log_n = score_bias_neg_log_n;
  p.window_left = window_left;
  set_score_mod(kOp, p, qv, kind, score_bias, alibi_slopes, sink);
  check_cache_values(kOp, qv, kv, d.cache);

  Tensor out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, q);
  const bool softmax = p.map == ScoreMap::softmax;
  Tensor lse = empty(softmax ? std::vector{p.batch, p.heads, p.seqlen_q} : std::vector<int64_t>{0},
                     q, ScalarType::Float);
  p.out = rows_of(View(out), false);
  p.lse = softmax ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  if (out.numel() > 0) run(d, qv);
  return {out, lse};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("attention_decode", TOKENMILL_BOX(attention_decode)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("attention_decode", TOKENMILL_BOX(attention_decode)); }
#endif

}  // namespace tokenmill
