// Host code shared by attention operators on [B, S, H, D] with gradients for q, k and v.
#pragma once
#include "attention/score_mod.h"
#include "core/qkv.h"

namespace tokenmill {

// [B, S, H, D], or packed [T, H, D].
inline Rows rows_of(const View& t) { return rows_of(t, t.dim() == 3); }

// Parameters of softmax attention over the call's q and k. Packed calls have batch 0 at this point.
template <typename Args>
void set_inputs(AttentionParams& p, const Args& a) {
  p.batch = a.q.dim() == 3 ? 0 : a.q.size(0);
  p.seqlen_q = a.q.size(-3);
  p.seqlen_k = a.k.size(-3);
  p.heads = a.q.size(-2);
  p.kv_heads = a.k.size(-2);
  p.head_dim = a.q.size(-1);
  p.value_dim = a.v.size(-1);
  p.dtype = to_dtype(a.q.dtype);
  p.map = ScoreMap::softmax;
  p.q = rows_of(a.q);
  p.k = rows_of(a.k);
  p.v = rows_of(a.v);
  p.scale = static_cast<float>(scale_of(a));
  p.window_left = p.window_right = -1;
}

template <typename Args>
std::vector<int64_t> out_sizes(const Args& a) {
  std::vector<int64_t> sizes = a.q.sizes;
  sizes.back() = a.v.size(-1);
  return sizes;
}

// Returns lse; run() writes it and out.
template <typename Run>
Array forward_into(AttentionParams& p, const View& q, const View& out, Run run) {
  out.note(true);
  Array lse = empty(lse_sizes(p), q, ScalarType::Float);
  p.out = rows_of(out);
  p.lse = lse.mutable_data<float>();
  if (out.numel() > 0) run();
  return lse;
}

// Returns out and lse, written by run().
template <typename Run>
std::tuple<Array, Array> forward_of(AttentionParams& p, const View& q, Run run) {
  Array out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, q);
  Array lse = forward_into(p, q, out, run);
  return {out, lse};
}

// Returns dq, dk and dv, written by run(). The record `a` is {dout, dlse, out, lse, forward}; f is
// the forward's parameters within p.
template <typename Params, typename Args, typename Run>
std::tuple<Array, Array, Array> gradients_of(const char* op, Params& p, AttentionParams& f,
                                             const Args& a, Run run) {
  const auto& in = a.forward;
  const std::vector<int64_t> like_out = out_sizes(in), like_lse = lse_sizes(f);
  check_like_out(op, "dout", a.dout, like_out, in.q);
  check_like_out(op, "out", a.out, like_out, in.q);
  p.dout = rows_of(a.dout);
  f.out = rows_of(a.out);
  f.lse = check_like_lse(op, "lse", a.lse, like_lse, in.q);
  if (a.dlse) p.dlse = check_like_lse(op, "dlse", a.dlse, like_lse, in.q);
  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = rows_of(dq);
  p.dk = rows_of(dk);
  p.dv = rows_of(dv);
  if (in.q.numel() > 0 && (in.k.numel() > 0 || f.sink))
    run();
  else
    fill(0, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace tokenmill
