#include <limits>

#include "core/qkv.h"
#include "core/stream.h"
#include "dense/attention/band.h"
#include "dense/attention/params.h"
#include "dense/score_mod.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "attention";

// The arguments of the schema after q, k, v: the lowered list.
struct Options {
  std::string kind;
  double scale;
  OptTensor score_bias;
  double score_bias_value;
  bool score_bias_neg_log_n;
  OptTensor bias, alibi_slopes, sink;
  double softcap;
  bool causal;
  int64_t window_left, window_right;
  OptTensor cu_seqlens_q, cu_seqlens_k;
  std::optional<int64_t> max_seqlen_q, max_seqlen_k;
  std::string precision;

  bool packed() const { return cu_seqlens_q || cu_seqlens_k; }
};

// The checks below are those of python/tokenmill/dense/attention_rules.py, in its order and words.
void check_values(const char* name, const View& cu, const char* bound_name,
                  const std::optional<int64_t>& bound, int64_t total) {
  const int64_t longest = check_cu_seqlens_values(kOp, name, cu, total);
  check(!bound || *bound >= longest, kOp, bound_name,
        Rule("must be at least the longest sequence, ", longest), bound.value_or(0));
}

// Returns the number of sequences.
int64_t check_cu_seqlens(const View& q, const View& k, const Options& o) {
  const std::pair<const char*, const std::optional<int64_t>*> bounds[] = {
      {"max_seqlen_q", &o.max_seqlen_q}, {"max_seqlen_k", &o.max_seqlen_k}};
  if (!o.cu_seqlens_q || !o.cu_seqlens_k) {
    if (o.packed())
      fail(kOp, o.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
           "must be given with its counterpart", "None");
    for (auto [name, bound] : bounds)
      check(!*bound, kOp, name, "goes with cu_seqlens alone", bound->value_or(0));
    return q.size(0);
  }
  const View cu_q(*o.cu_seqlens_q), cu_k(*o.cu_seqlens_k);
  const std::pair<const char*, const View*> all[] = {{"cu_seqlens_q", &cu_q},
                                                     {"cu_seqlens_k", &cu_k}};
  for (auto [name, t] : all) check_cu_seqlens(kOp, name, *t, q);
  check(cu_k.size(0) == cu_q.size(0), kOp, "cu_seqlens_k",
        Rule("must have the length of cu_seqlens_q, ", cu_q.size(0)), cu_k.size(0));
  for (auto [name, bound] : bounds)
    check(bound->value_or(0) >= 0, kOp, name, "must not be negative", bound->value_or(0));
  if (!q.is_cuda) {
    check_values("cu_seqlens_q", cu_q, "max_seqlen_q", o.max_seqlen_q, q.size(0));
    check_values("cu_seqlens_k", cu_k, "max_seqlen_k", o.max_seqlen_k, k.size(0));
  }
  return cu_q.size(0) - 1;
}

AttentionParams make_params(const View& q, const View& k, const View& v, const Options& o) {
  const bool packed = o.packed();
  check_qkv(kOp, q, k, v, packed ? 3 : 4);
  check_kind(kOp, o.kind);
  check(o.precision == "accurate" || o.precision == "fast", kOp, "precision",
        "must be 'accurate' or 'fast'", o.precision);
  check_scale(kOp, o.scale, o.softcap);
  check(o.window_left >= -1, kOp, "window", "left must be >= -1 (-1 = no limit)", o.window_left);
  check(o.window_right >= -1, kOp, "window", "right must be >= -1 (-1 = no limit)", o.window_right);
  AttentionParams p{};
  p.batch = check_cu_seqlens(q, k, o);
  p.heads = q.size(-2);
  p.kv_heads = k.size(-2);
  p.seqlen_q = q.size(packed ? 0 : 1);
  p.seqlen_k = k.size(packed ? 0 : 1);
  p.head_dim = q.size(-1);
  p.value_dim = v.size(-1);
  p.dtype = to_dtype(q.dtype);
  p.map = o.kind == "softmax" ? ScoreMap::softmax : ScoreMap::sigmoid;
  p.q = rows_of(q, packed);
  p.k = rows_of(k, packed);
  p.v = rows_of(v, packed);
  if (packed) {
    p.cu_seqlens_q = static_cast<const int32_t*>(o.cu_seqlens_q->const_data_ptr());
    p.cu_seqlens_k = static_cast<const int32_t*>(o.cu_seqlens_k->const_data_ptr());
  }
  p.scale = static_cast<float>(o.scale);
  p.softcap = static_cast<float>(o.softcap);
  p.score_bias_value = static_cast<float>(o.score_bias_value);
  p.score_bias_neg_log_n = o.score_bias_neg_log_n;
  set_score_mod(kOp, p, q, o.kind, o.score_bias, o.alibi_slopes, o.sink);
  if (o.bias) {
    const View t(*o.bias);
    const std::vector<int64_t> full{p.batch, p.heads,
                                    packed ? o.max_seqlen_q.value_or(p.seqlen_q) : p.seqlen_q,
                                    packed ? o.max_seqlen_k.value_or(p.seqlen_k) : p.seqlen_k};
    bool ok = t.dim() == 4;
    for (int i = 0; ok && i < 4; ++i) ok = t.size(i) == 1 || t.size(i) == full[i];
    check(ok, kOp, "bias", Rule("must broadcast to [B, H, Sq, Sk] = ", full), t.sizes);
    if (q.dtype == ScalarType::Float)
      check(t.dtype == q.dtype, kOp, "bias", "must be float32", t.dtype);
    check(t.dtype == q.dtype || t.dtype == ScalarType::Float, kOp, "bias",
          Rule("must be ", q.dtype, " or float32"), t.dtype);
    check_last_contiguous(kOp, "bias", t);
    check_device_of_q(kOp, "bias", t, q);
    p.bias = t.data();
    p.bias_dtype = to_dtype(t.dtype);
    p.bias_batch = t.step(0);
    p.bias_head = t.step(1);
    p.bias_q = t.step(2);
    p.bias_k = t.step(3);
    p.bias_rows = t.size(2) == 1 ? Band::kFar : t.size(2);
    p.bias_columns = t.size(3) == 1 ? Band::kFar : t.size(3);
  }
  p.window_left = o.window_left;
  p.window_right = o.causal ? 0 : o.window_right;
  p.fast = o.precision == "fast";
  return p;
}

std::vector<int64_t> lse_sizes(const AttentionParams& p) {
  if (p.map == ScoreMap::sigmoid) return {0};
  if (p.cu_seqlens_q) return {p.heads, p.seqlen_q};
  return {p.batch, p.heads, p.seqlen_q};
}

float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void run_forward(const AttentionParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, p);
#endif
  cpu::attention_forward(p);
}

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, std::string kind, double scale,
                                     OptTensor score_bias, double score_bias_value,
                                     bool score_bias_neg_log_n, OptTensor bias,
                                     OptTensor alibi_slopes, OptTensor sink, double softcap,
                                     bool causal, int64_t window_left, int64_t window_right,
                                     OptTensor cu_seqlens_q, OptTensor cu_seqlens_k,
                                     std::optional<int64_t> max_seqlen_q,
                                     std::optional<int64_t> max_seqlen_k, std::string precision) {
  const View qv(q), kv(k), vv(v);
  const Options o{kind,         scale,        score_bias,   score_bias_value, score_bias_neg_log_n,
                  bias,         alibi_slopes, sink,         softcap,          causal,
                  window_left,  window_right, cu_seqlens_q, cu_seqlens_k,     max_seqlen_q,
                  max_seqlen_k, precision};
  AttentionParams p = make_params(qv, kv, vv, o);
  std::vector<int64_t> out_sizes = qv.sizes;
  out_sizes.back() = p.value_dim;
  Tensor out = empty(out_sizes, q);
  Tensor lse = empty(lse_sizes(p), q, ScalarType::Float);
  p.out = rows_of(View(out), o.packed());
  p.lse = p.map == ScoreMap::softmax ? float_data(lse) : nullptr;
  if (p.batch == 0) {
    fill(0, out);
    fill(-std::numeric_limits<double>::infinity(), lse);
  } else if (out.numel() > 0) {
    run_forward(p, qv);
  }
  return {out, lse};
}

void run_backward(AttentionBackwardParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) {
    const AttentionParams& f = p.forward;
    const int64_t rows = f.cu_seqlens_q ? f.heads * f.seqlen_q : f.batch * f.heads * f.seqlen_q;
    const int64_t sums =
        f.cu_seqlens_q ? f.heads * blocks_of_sums(f) : f.batch * f.heads * blocks_of_sums(f);
    const bool softmax = f.map == ScoreMap::softmax;
    const bool wants_sums = (p.dscore_bias && !softmax) || p.dalibi_slopes;
    Tensor statistics = empty({softmax ? 2 * rows : 0}, q.tensor, ScalarType::Float);
    Tensor partial = empty({wants_sums ? 2 * sums : 0}, q.tensor, ScalarType::Float);
    if (softmax) {
      p.minus_lse = float_data(statistics);
      p.minus_delta = p.minus_lse + rows;
    }
    if (wants_sums) p.sums = float_data(partial);
    return launch_on_device(kOp, q, p);
  }
#endif
  cpu::attention_backward(p);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Sums [B, H] over the batch where the argument was [H].
Tensor fit(const Tensor& grad, const Tensor& argument) {
  if (argument.dim() == 2) return grad;
  const std::vector<int64_t> batch{0};
  return torch::stable::sum(grad, torch::headeronly::IntHeaderOnlyArrayRef(batch));
}

Gradients attention_backward(Tensor dout, OptTensor dlse, OptTensor out, OptTensor lse,
                             std::vector<bool> needs, Tensor q, Tensor k, Tensor v,
                             std::string kind, double scale, OptTensor score_bias,
                             double score_bias_value, bool score_bias_neg_log_n, OptTensor bias,
                             OptTensor alibi_slopes, OptTensor sink, double softcap, bool causal,
                             int64_t window_left, int64_t window_right, OptTensor cu_seqlens_q,
                             OptTensor cu_seqlens_k, std::optional<int64_t> max_seqlen_q,
                             std::optional<int64_t> max_seqlen_k, std::string precision) {
  const View qv(q), kv(k), vv(v), dv_out(dout);
  const Options o{kind,         scale,        score_bias,   score_bias_value, score_bias_neg_log_n,
                  bias,         alibi_slopes, sink,         softcap,          causal,
                  window_left,  window_right, cu_seqlens_q, cu_seqlens_k,     max_seqlen_q,
                  max_seqlen_k, precision};
  AttentionBackwardParams p{};
  p.forward = make_params(qv, kv, vv, o);
  const AttentionParams& f = p.forward;
  const bool packed = o.packed(), softmax = f.map == ScoreMap::softmax;

  std::vector<int64_t> out_sizes = qv.sizes;
  out_sizes.back() = f.value_dim;
  check_like_out(kOp, "dout", dv_out, out_sizes, qv);
  p.dout = rows_of(dv_out, packed);
  if (softmax) {
    if (!out || !lse) fail(kOp, out ? "lse" : "out", "must be given with kind 'softmax'", "None");
    const View ov(*out);
    check_like_out(kOp, "out", ov, out_sizes, qv);
    p.forward.out = rows_of(ov, packed);
    p.forward.lse = check_like_lse(kOp, "lse", *lse, lse_sizes(f), qv);
    if (dlse) p.dlse = check_like_lse(kOp, "dlse", *dlse, lse_sizes(f), qv);
  }
  check(needs.size() == 4, kOp, "needs", "must have 4 flags (score_bias, bias, alibi_slopes, sink)",
        static_cast<int64_t>(needs.size()));

  Tensor dq = empty(qv.sizes, q), dk = empty(kv.sizes, q), dv = empty(vv.sizes, q);
  p.dq = rows_of(View(dq), packed);
  p.dk = rows_of(View(dk), packed);
  p.dv = rows_of(View(dv), packed);
  const bool wants_score_bias = needs[0] && score_bias, wants_bias = needs[1] && bias;
  const bool wants_alibi = needs[2] && alibi_slopes, wants_sink = needs[3] && sink;
  const auto zeros = [&](bool wanted, const std::vector<int64_t>& sizes) {
    Tensor made =
        torch::stable::new_zeros(q, wanted ? sizes : std::vector<int64_t>(1), ScalarType::Float);
    View(made).note(true);
    return made;
  };
  Tensor dscore_bias = zeros(wants_score_bias, {f.batch, f.heads});
  Tensor dalibi = zeros(wants_alibi, {f.batch, f.heads});
  Tensor dsink = zeros(wants_sink, {f.batch, f.heads});
  Tensor dbias = zeros(wants_bias, wants_bias ? View(*bias).sizes : std::vector<int64_t>{});
  if (wants_score_bias) p.dscore_bias = float_data(dscore_bias);
  if (wants_alibi) p.dalibi_slopes = float_data(dalibi);
  if (wants_sink) p.dsink = float_data(dsink);
  if (wants_bias) {
    const View t(dbias);
    p.dbias = float_data(dbias);
    p.dbias_batch = t.step(0);
    p.dbias_head = t.step(1);
    p.dbias_q = t.step(2);
    p.dbias_k = t.step(3);
  }
  if (f.batch == 0 || q.numel() == 0)
    fill(0, dq, dk, dv);
  else
    run_backward(p, qv);
  return {dq,
          dk,
          dv,
          wants_score_bias ? fit(dscore_bias, *score_bias) : dscore_bias,
          dbias,
          wants_alibi ? fit(dalibi, *alibi_slopes) : dalibi,
          wants_sink ? fit(dsink, *sink) : dsink};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("attention", TOKENMILL_BOX(attention));
  m.impl("attention_backward", TOKENMILL_BOX(attention_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("attention", TOKENMILL_BOX(attention));
  m.impl("attention_backward", TOKENMILL_BOX(attention_backward));
}
#endif

}  // namespace tokenmill
