#include "core/stream.h"
#include "core/written.h"
#include "linear/checks.h"
#include "linear/linear_attention/kernels.h"
#include "linear/linear_attention/per_channel.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "linear_attention";

struct LinearAttentionArgs : Record {
  View q, k, v, log_decay;
  std::string_view feature_map;
  Optional<double> scale;
  bool normalize;
  View initial_state;
  bool return_final_state;
  View cu_seqlens;
  Optional<int64_t> chunk_size;

  bool packed() const { return bool(cu_seqlens); }
};

std::vector<int64_t> state_sizes(const LinearAttentionParams& p) {
  return {p.batch, p.heads, feature_dim(p.map, p.head_dim), p.value_dim + p.normalize};
}

std::vector<int64_t> normalizer_sizes(const LinearAttentionParams& p) {
  if (!p.normalize) return {0};
  if (p.cu_seqlens) return {p.heads, p.seqlen};
  return {p.batch, p.heads, p.seqlen};
}

std::vector<int64_t> out_sizes(const View& q, const View& v) {
  std::vector<int64_t> sizes = q.sizes;
  sizes.back() = v.size(-1);
  return sizes;
}

// All rules on metadata.
LinearAttentionParams make_params(const LinearAttentionArgs& a) {
  const bool packed = a.packed();
  LinearAttentionParams p{};
  p.map = check_linear_inputs(kOp, a.q, a.k, a.v, a.log_decay, a.feature_map, scale_of(a),
                              a.normalize, packed);
  place_tokens(kOp, p, a);
  p.heads = a.q.size(-2);
  p.kv_heads = a.k.size(-2);
  p.normalize = a.normalize;
  p.scale = static_cast<float>(scale_of(a));
  if (a.log_decay) p.decay = log_decay_of(a.log_decay, packed);
  if (a.initial_state) p.initial = initial_state_of(kOp, a.initial_state, state_sizes(p), a.q);
  const int64_t chunk = a.chunk_size.value_or(0);
  const bool power = chunk >= 16 && chunk <= 256 && (chunk & (chunk - 1)) == 0;
  check(!a.chunk_size || power, kOp, "chunk_size", "must be a power of two from 16 to 256", chunk);
  p.chunk_size = chunk;
  return p;
}

float* float_data(const View& t) { return t.mutable_data<float>(); }

void run(LinearAttentionParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  if (p.decay.per_channel) return cpu::delta_attention_forward(without_correction(p));
  cpu::linear_attention_forward(p);
}
void run(LinearAttentionBackwardParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.forward.workspace);
  if (p.forward.decay.per_channel) return cpu::delta_attention_backward(without_correction(p));
  cpu::linear_attention_backward(p);
}

// Writes out; returns final_state and normalizer.
std::tuple<Array, Array> forward(LinearAttentionParams& p, const LinearAttentionArgs& a,
                                 const View& out) {
  out.note(true);
  p.out = rows_of(out, a.packed());
  Array final_state = empty(a.return_final_state ? state_sizes(p) : std::vector<int64_t>{0}, a.q,
                            ScalarType::Float);
  Array normalizer = empty(normalizer_sizes(p), a.q, ScalarType::Float);
  if (a.return_final_state) p.final = states_of(final_state);
  if (p.normalize) p.normalizer = float_data(normalizer);
  if (p.batch == 0)
    fill(0, out, normalizer);
  else if (out.numel() + final_state.numel() > 0)
    run(p, a.q);
  return {final_state, normalizer};
}

std::tuple<Array, Array, Array> linear_attention(const LinearAttentionArgs& a) {
  LinearAttentionParams p = make_params(a);
  check_recurrence_values(kOp, a);
  Array out = empty(out_sizes(a.q, a.v), a.q);
  auto [final_state, normalizer] = forward(p, a, out);
  return {out, final_state, normalizer};
}

struct LinearAttentionOutArgs : Record {
  LinearAttentionArgs forward;
  View out;
};

std::tuple<Array, Array> linear_attention_out(const LinearAttentionOutArgs& a) {
  const LinearAttentionArgs& in = a.forward;
  LinearAttentionParams p = make_params(in);
  check_like_out(kOp, "out", a.out, out_sizes(in.q, in.v), in.q);
  check_written(kOp, a);
  check_recurrence_values(kOp, in);
  return forward(p, in, a.out);
}

using Gradients = std::tuple<Array, Array, Array, Array, Array>;

struct LinearAttentionBackwardArgs : Record {
  View dout, dfinal_state, out, normalizer;
  bool needs_dlog_decay, needs_dinitial_state;
  LinearAttentionArgs forward;
};

Gradients linear_attention_backward(const LinearAttentionBackwardArgs& a) {
  const LinearAttentionArgs& in = a.forward;
  LinearAttentionBackwardParams p{};
  p.forward = make_params(in);
  LinearAttentionParams& f = p.forward;
  const bool packed = in.packed();
  if (a.dout) {
    const View& t = a.dout;
    check_like_out(kOp, "dout", t, out_sizes(in.q, in.v), in.q);
    p.dout = rows_of(t, packed);
  }
  if (a.dfinal_state) {
    const View& t = a.dfinal_state;
    check_like_lse(kOp, "dfinal_state", t, state_sizes(f), in.q);
    p.dfinal = states_of(t);
  }
  if (in.normalize && a.dout) {
    if (!a.out || !a.normalizer)
      fail(kOp, a.out ? "normalizer" : "out", "must be given with normalize and dout", "None");
    check_like_out(kOp, "out", a.out, out_sizes(in.q, in.v), in.q);
    f.out = rows_of(a.out, packed);
    f.normalizer = check_like_lse(kOp, "normalizer", a.normalizer, normalizer_sizes(f), in.q);
  }
  check_recurrence_values(kOp, in);

  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  const bool wants_decay = a.needs_dlog_decay && in.log_decay,
             wants_initial = a.needs_dinitial_state && in.initial_state;
  std::vector<int64_t> decay_sizes{0};
  if (wants_decay && f.decay.per_token)
    decay_sizes = in.log_decay.sizes;
  else if (wants_decay)
    decay_sizes = {f.batch, f.heads};
  Array ddecay = empty(decay_sizes, in.q, ScalarType::Float);
  Array dinitial =
      empty(wants_initial ? state_sizes(f) : std::vector<int64_t>{0}, in.q, ScalarType::Float);
  if (wants_decay) {
    const View& t = ddecay;
    p.ddecay = log_decay_of(t, packed);
    p.ddecay.per_token = f.decay.per_token;
    if (!f.decay.per_token) p.ddecay.batch = t.step(0), p.ddecay.seq = 0;
  }
  if (wants_initial) p.dinitial = states_of(dinitial);
  if (f.batch == 0 || f.heads == 0)
    fill(0, dq, dk, dv, ddecay);
  else if (in.q.numel() + in.k.numel() + ddecay.numel() + dinitial.numel() > 0)
    run(p, in.q);
  return {dq, dk, dv, ddecay, dinitial};
}

const Registration kOperators({&implement<linear_attention>("linear_attention"),
                               &implement<linear_attention_out>("linear_attention_out"),
                               &implement<linear_attention_backward>("linear_attention_backward")});

}  // namespace
}  // namespace tokenmill
