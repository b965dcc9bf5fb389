// What the host functions share of attention on [B, S, H, D] whose gradients are those of q, k, v.
#pragma once
#include "core/qkv.h"
#include "dense/attention/params.h"

namespace tokenmill {

// Softmax of the products of the call's queries and keys.
template <typename Args>
void set_inputs(AttentionParams& p, const Args& a) {
  p.batch = a.q.size(0);
  p.seqlen_q = a.q.size(1);
  p.seqlen_k = a.k.size(1);
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
  p.window_left = p.window_right = -1;
}

template <typename Args>
std::vector<int64_t> out_sizes(const Args& a) {
  std::vector<int64_t> sizes = a.q.sizes;
  sizes.back() = a.v.size(-1);
  return sizes;
}

// lse; run() writes it and out.
template <typename Run>
Array forward_into(AttentionParams& p, const View& q, const View& out, Run run) {
  out.note(true);
  Array lse = empty({p.batch, p.heads, p.seqlen_q}, q, ScalarType::Float);
  p.out = rows_of(out, false);
  p.lse = lse.mutable_data<float>();
  if (out.numel() > 0) run();
  return lse;
}

// out and lse, written by run().
template <typename Run>
std::tuple<Array, Array> forward_of(AttentionParams& p, const View& q, Run run) {
  Array out = empty({p.batch, p.seqlen_q, p.heads, p.value_dim}, q);
  Array lse = forward_into(p, q, out, run);
  return {out, lse};
}

// dq, dk and dv, written by run(). The record a is {dout, dlse, out, lse, forward}; f are the
// forward's parameters in p.
template <typename Params, typename Args, typename Run>
std::tuple<Array, Array, Array> gradients_of(const char* op, Params& p, AttentionParams& f,
                                             const Args& a, Run run) {
  const auto& in = a.forward;
  const std::vector<int64_t> like_out{f.batch, f.seqlen_q, f.heads, f.value_dim};
  const std::vector<int64_t> like_lse{f.batch, f.heads, f.seqlen_q};
  check_like_out(op, "dout", a.dout, like_out, in.q);
  check_like_out(op, "out", a.out, like_out, in.q);
  p.dout = rows_of(a.dout, false);
  f.out = rows_of(a.out, false);
  f.lse = check_like_lse(op, "lse", a.lse, like_lse, in.q);
  if (a.dlse) p.dlse = check_like_lse(op, "dlse", a.dlse, like_lse, in.q);
  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = rows_of(dq, false);
  p.dk = rows_of(dk, false);
  p.dv = rows_of(dv, false);
  if (in.q.numel() > 0 && (in.k.numel() > 0 || f.sink))
    run();
  else
    fill(0, dq, dk, dv);
  return {dq, dk, dv};
}

}  // namespace tokenmill
