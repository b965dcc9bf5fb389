#include "attention/score_mod.h"
#include "core/stream.h"
#include "sparse/gradients.h"
#include "sparse/landmark_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "landmark_attention";

struct LandmarkAttentionArgs : Record {
  View q, k, v;
  int64_t block;
  Optional<double> scale;
};

LandmarkParams make_params(const LandmarkAttentionArgs& a) {
  check(a.block >= 2 && a.block < int64_t{1} << 31, kOp, "block", "must be 2 to 2^31 - 1", a.block);
  check_qkv(kOp, a.q, a.k, a.v, 4);
  const int64_t tokens = a.q.size(1);
  check(a.k.size(1) == tokens, kOp, "k", Rule("must have the length of q, ", tokens), a.k.size(1));
  check_scale(kOp, scale_of(a));
  LandmarkParams d{};
  d.block = a.block;
  set_inputs(d.attention, a);
  d.attention.window_right = 0;
  return d;
}

void run_forward(const LandmarkParams& d, const View& q) {
  if (q.is_cuda) return launch_on_device(kOp, q, d);
  cpu::landmark_attention_forward(d);
}

std::tuple<Array, Array> landmark_attention(const LandmarkAttentionArgs& a) {
  LandmarkParams d = make_params(a);
  return forward_of(d.attention, a.q, [&] { run_forward(d, a.q); });
}

void run_backward(LandmarkBackwardParams& g, const View& q) {
  if (q.is_cuda) {
    AttentionBackwardParams& p = g.attention;
    const AttentionParams& f = p.forward;
    Array statistics = empty({2, f.batch, f.heads, f.seqlen_q}, q, ScalarType::Float);
    p.minus_lse = statistics.mutable_data<float>();
    p.minus_delta = p.minus_lse + f.batch * f.heads * f.seqlen_q;
    return launch_on_device(kOp, q, g);
  }
  cpu::landmark_attention_backward(g);
}

struct LandmarkAttentionBackwardArgs : Record {
  View dout, dlse, out, lse;
  LandmarkAttentionArgs forward;
};

std::tuple<Array, Array, Array> landmark_attention_backward(
    const LandmarkAttentionBackwardArgs& a) {
  const LandmarkParams d = make_params(a.forward);
  LandmarkBackwardParams g{};
  g.block = d.block;
  g.attention.forward = d.attention;
  return gradients_of(kOp, g.attention, g.attention.forward, a,
                      [&] { run_backward(g, a.forward.q); });
}

const Registration kOperators(
    {&implement<landmark_attention>("landmark_attention"),
     &implement<landmark_attention_backward>("landmark_attention_backward")});

}  // namespace
}  // namespace tokenmill
