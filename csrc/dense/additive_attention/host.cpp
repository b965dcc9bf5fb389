#include "core/qkv.h"
#include "core/stream.h"
#include "dense/additive_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "additive_attention";

struct AdditiveAttentionArgs : Record {
  View q, k, v_weight, mask;
};

AdditiveParams make_params(const AdditiveAttentionArgs& a) {
  check_dtype(kOp, "q", a.q);
  check(a.q.dim() == 3, kOp, "q", "must have 3 dimensions [B, T, A]", a.q.dim());
  AdditiveParams p{};
  p.batch = a.q.size(0);
  p.rows = a.q.size(1);
  p.width = a.q.size(2);
  for (const auto& [name, t] : {std::pair("k", &a.k), std::pair("v_weight", &a.v_weight)}) {
    check(t->dtype == a.q.dtype, kOp, name, Rule("must have the dtype of q, ", a.q.dtype),
          t->dtype);
    check_device_of_q(kOp, name, *t, a.q);
  }
  check(a.k.dim() == 3 && a.k.size(0) == p.batch && a.k.size(2) == p.width, kOp, "k",
        Rule("must have shape [", p.batch, ", N, ", p.width, "]"), a.k.sizes);
  check(a.v_weight.dim() == 1 && a.v_weight.size(0) == p.width, kOp, "v_weight",
        Rule("must have shape [", p.width, "]"), a.v_weight.sizes);
  p.keys = a.k.size(1);
  p.dtype = to_dtype(a.q.dtype);
  p.q = a.q.data();
  p.q_batch = a.q.step(0);
  p.q_row = a.q.step(1);
  p.k = a.k.data();
  p.k_batch = a.k.step(0);
  p.k_row = a.k.step(1);
  p.v = a.v_weight.data();
  if (a.mask) {
    check(a.mask.dtype == ScalarType::Bool, kOp, "mask", "must be bool", a.mask.dtype);
    const bool of_pairs = a.mask.sizes == std::vector<int64_t>{p.batch, p.rows, p.keys};
    check(of_pairs || a.mask.sizes == std::vector<int64_t>{p.batch, p.keys}, kOp, "mask",
          Rule("must have shape [", p.batch, ", ", p.keys, "] or [", p.batch, ", ", p.rows, ", ",
               p.keys, "]"),
          a.mask.sizes);
    check_device_of_q(kOp, "mask", a.mask, a.q);
    p.mask = a.mask.data<uint8_t>();
    p.mask_batch = a.mask.step(0);
    p.mask_row = of_pairs ? a.mask.step(1) : 0;
  }
  for (const auto& [name, t] : {std::pair("q", &a.q), std::pair("k", &a.k),
                                std::pair("v_weight", &a.v_weight), std::pair("mask", &a.mask)})
    if (*t) check_last_contiguous(kOp, name, *t);
  return p;
}

template <typename Params, typename Cpu>
void launch(const Params& p, const View& q, const Cpu& launch_cpu) {
  if (q.is_cuda) return launch_on_device(kOp, q, p);
  launch_cpu(p);
}

Array additive_attention(const AdditiveAttentionArgs& a) {
  AdditiveParams p = make_params(a);
  Array scores = empty({p.batch, p.rows, p.keys}, a.q, ScalarType::Float);
  p.scores = scores.mutable_data<float>();
  if (scores.numel() > 0) launch(p, a.q, cpu::additive_scores);
  return scores;
}

struct AdditiveAttentionBackwardArgs : Record {
  View dscores;
  AdditiveAttentionArgs forward;
};

std::tuple<Array, Array, Array> additive_attention_backward(
    const AdditiveAttentionBackwardArgs& a) {
  const AdditiveAttentionArgs& in = a.forward;
  AdditiveBackwardParams p{};
  p.forward = make_params(in);
  const std::vector<int64_t> wanted{p.forward.batch, p.forward.rows, p.forward.keys};
  check(a.dscores.sizes == wanted, kOp, "dscores", Rule("must have shape ", wanted),
        a.dscores.sizes);
  check(a.dscores.dtype == ScalarType::Float, kOp, "dscores", "must be float32", a.dscores.dtype);
  check_last_contiguous(kOp, "dscores", a.dscores);
  check_device_of_q(kOp, "dscores", a.dscores, in.q);
  p.dscores = a.dscores.data<float>();
  p.dscores_batch = a.dscores.step(0);
  p.dscores_row = a.dscores.step(1);
  Array dq = empty(in.q.sizes, in.q);
  Array dk = empty(in.k.sizes, in.k);
  Array dv = empty(in.v_weight.sizes, in.v_weight);
  p.dq = dq.mutable_data();
  p.dk = dk.mutable_data();
  p.dv = dv.mutable_data();
  if (a.dscores.numel() == 0) {
    fill(0, dq, dk, dv);
    return {dq, dk, dv};
  }
  if (dv.numel() == 0) return {dq, dk, dv};
  Array workspace;
  if (in.q.is_cuda) {
    workspace = empty({workspace_on_device(in.q, p)}, in.q, ScalarType::Byte);
    p.workspace = workspace.mutable_data();
  }
  launch(p, in.q, cpu::additive_scores_backward);
  return {dq, dk, dv};
}

const Registration kOperators(
    {&implement<additive_attention>("additive_attention"),
     &implement<additive_attention_backward>("additive_attention_backward")});

}  // namespace
}  // namespace tokenmill
