#include "core/stream.h"
#include "linear/checks.h"
#include "linear/delta_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "delta_attention";

struct DeltaAttentionArgs : Record {
  View q, k, v, beta, log_decay;
  Optional<double> scale;
  bool qk_l2norm;
  View initial_state;
  bool return_final_state;
  View cu_seqlens;

  bool packed() const { return bool(cu_seqlens); }
};

std::vector<int64_t> state_sizes(const DeltaAttentionParams& p) {
  return {p.batch, p.heads, p.head_dim, p.value_dim};
}

// All rules on metadata.
DeltaAttentionParams make_params(const DeltaAttentionArgs& a) {
  const bool packed = a.packed();
  check_delta_inputs(kOp, a, packed);
  DeltaAttentionParams p{};
  place_tokens(kOp, p, a);
  p.heads = a.v.size(-2);
  p.key_heads = a.q.size(-2);
  p.l2norm = a.qk_l2norm;
  p.scale = static_cast<float>(scale_of(a));
  p.beta = gates_of(a.beta, packed);
  p.per_channel = per_channel(a);
  if (a.log_decay) p.log_decay = decays_of(a.log_decay, packed, p.per_channel);
  if (a.initial_state) p.initial = initial_state_of(kOp, a.initial_state, state_sizes(p), a.q);
  return p;
}

void run(DeltaAttentionParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  cpu::delta_attention_forward(p);
}
void run(DeltaAttentionBackwardParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.forward.workspace);
  cpu::delta_attention_backward(p);
}

std::tuple<Array, Array> delta_attention(const DeltaAttentionArgs& a) {
  DeltaAttentionParams p = make_params(a);
  check_recurrence_values(kOp, a);
  Array out = empty(a.v.sizes, a.q);
  Array final_state = empty(a.return_final_state ? state_sizes(p) : std::vector<int64_t>{0}, a.q,
                            ScalarType::Float);
  p.out = rows_of(out, a.packed());
  if (a.return_final_state) p.final = states_of(final_state);
  if (p.batch == 0)
    fill(0, out);
  else if (out.numel() + final_state.numel() > 0)
    run(p, a.q);
  return {out, final_state};
}

struct DeltaAttentionBackwardArgs : Record {
  View dout, dfinal_state;
  bool needs_dlog_decay, needs_dinitial_state;
  DeltaAttentionArgs forward;
};

using Gradients = std::tuple<Array, Array, Array, Array, Array, Array>;

Gradients delta_attention_backward(const DeltaAttentionBackwardArgs& a) {
  const DeltaAttentionArgs& in = a.forward;
  DeltaAttentionBackwardParams p{};
  p.forward = make_params(in);
  DeltaAttentionParams& f = p.forward;
  const bool packed = in.packed();
  if (a.dout) {
    check_like_out(kOp, "dout", a.dout, in.v.sizes, in.q);
    p.dout = rows_of(a.dout, packed);
  }
  if (a.dfinal_state) {
    check_like_lse(kOp, "dfinal_state", a.dfinal_state, state_sizes(f), in.q);
    p.dfinal = states_of(a.dfinal_state);
  }
  check_recurrence_values(kOp, in);

  const bool wants_decay = a.needs_dlog_decay && in.log_decay,
             wants_initial = a.needs_dinitial_state && in.initial_state;
  const std::vector<int64_t> nothing{0}, state = state_sizes(f);
  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  Array dbeta = empty(in.beta.sizes, in.q, ScalarType::Float);
  Array ddecay = empty(wants_decay ? in.log_decay.sizes : Sizes(nothing), in.q, ScalarType::Float);
  Array dinitial = empty(wants_initial ? state : nothing, in.q, ScalarType::Float);
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  p.dbeta = gates_of(dbeta, packed);
  if (wants_decay) p.dlog_decay = decays_of(ddecay, packed, f.per_channel);
  if (wants_initial) p.dinitial = states_of(dinitial);
  if (f.batch == 0 || f.heads == 0)
    fill(0, dq, dk, dv, dbeta, ddecay);
  else if (in.q.numel() + dinitial.numel() > 0)
    run(p, in.q);
  return {dq, dk, dv, dbeta, ddecay, dinitial};
}

const Registration kOperators({&implement<delta_attention>("delta_attention"),
                               &implement<delta_attention_backward>("delta_attention_backward")});

}  // namespace
}  // namespace tokenmill
