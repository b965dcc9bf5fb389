#include "core/qkv.h"
#include "core/stream.h"
#include "dense/score_mod.h"
#include "sparse/landmark_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "landmark_attention";

struct LandmarkAttentionArgs : Record {
  View q, k, v;
  int64_t block;
  Optional<double> scale;
};

// The checks are those of python/tokenmill/sparse/landmark_attention.py, in its order and words.
LandmarkParams make_params(const LandmarkAttentionArgs& a) {
  check(a.block >= 2 && a.block < int64_t{1} << 31, kOp, "block", "must be 2 to 2^31 - 1", a.block);
  check_qkv(kOp, a.q, a.k, a.v, 4);
  const int64_t tokens = a.q.size(1);
  check(a.k.size(1) == tokens, kOp, "k", Rule("must have the length of q, ", tokens), a.k.size(1));
  check_scale(kOp, scale_of(a), 0);
  LandmarkParams d{};
  d.block = a.block;
  AttentionParams& p = d.attention;
  p.batch = a.q.size(0);
  p.seqlen_q = p.seqlen_k = tokens;
  p.heads = a.q.size(2);
  p.kv_heads = a.k.size(2);
  p.head_dim = a.q.size(3);
  p.value_dim = a.v.size(3);
  p.dtype = to_dtype(a.q.dtype);
  p.map = ScoreMap::softmax;
  p.q = rows_of(a.q, false);
  p.k = rows_of(a.k, false);
  p.v = rows_of(a.v, false);
  p.scale = static_cast<float>(scale_of(a));
  p.window_left = -1;
  return d;
}

void run_forward(const LandmarkParams& d, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, d);
#endif
  cpu::landmark_attention_forward(d);
}

std::tuple<Array, Array> landmark_attention(const LandmarkAttentionArgs& a) {
  LandmarkParams d = make_params(a);
  AttentionParams& p = d.attention;
  Array out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, a.q);
  Array lse = empty({p.batch, p.heads, p.seqlen_q}, a.q, ScalarType::Float);
  p.out = rows_of(out, false);
  p.lse = lse.mutable_data<float>();
  if (out.numel() > 0) run_forward(d, a.q);
  return {out, lse};
}

void run_backward(LandmarkBackwardParams& g, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) {
    AttentionBackwardParams& p = g.attention;
    const AttentionParams& f = p.forward;
    Array statistics = empty({2, f.batch, f.heads, f.seqlen_q}, q, ScalarType::Float);
    p.minus_lse = statistics.mutable_data<float>();
    p.minus_delta = p.minus_lse + f.batch * f.heads * f.seqlen_q;
    return launch_on_device(kOp, q, g);
  }
#endif
  cpu::landmark_attention_backward(g);
}

struct LandmarkAttentionBackwardArgs : Record {
  View dout, dlse, out, lse;
  LandmarkAttentionArgs forward;
};

std::tuple<Array, Array, Array> landmark_attention_backward(
    const LandmarkAttentionBackwardArgs& a) {
  const LandmarkAttentionArgs& in = a.forward;
  const LandmarkParams d = make_params(in);
  LandmarkBackwardParams g{};
  g.block = d.block;
  AttentionBackwardParams& p = g.attention;
  p.forward = d.attention;
  AttentionParams& f = p.forward;
  const std::vector<int64_t> like_out{f.batch, f.seqlen_q, f.heads, f.value_dim};
  const std::vector<int64_t> like_lse{f.batch, f.heads, f.seqlen_q};
  check_like_out(kOp, "dout", a.dout, like_out, in.q);
  check_like_out(kOp, "out", a.out, like_out, in.q);
  p.dout = rows_of(a.dout, false);
  f.out = rows_of(a.out, false);
  f.lse = check_like_lse(kOp, "lse", a.lse, like_lse, in.q);
  if (a.dlse) p.dlse = check_like_lse(kOp, "dlse", a.dlse, like_lse, in.q);
  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = rows_of(dq, false);
  p.dk = rows_of(dk, false);
  p.dv = rows_of(dv, false);
  if (in.q.numel() > 0)
    run_backward(g, in.q);
  else
    fill(0, dq, dk, dv);
  return {dq, dk, dv};
}

const Registration kOperators(
    {&implement<landmark_attention>("landmark_attention"),
     &implement<landmark_attention_backward>("landmark_attention_backward")});

}  // namespace
}  // namespace tokenmill
