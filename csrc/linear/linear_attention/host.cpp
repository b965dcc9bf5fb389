#include "core/stream.h"
#include "core/written.h"
#include "linear/checks.h"
#include "linear/linear_attention/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "linear_attention";

// The arguments of the schema after q, k, v: the lowered list.
struct Options {
  OptTensor log_decay;
  std::string feature_map;
  double scale;
  bool normalize;
  OptTensor initial_state;
  OptTensor cu_seqlens;
  std::optional<int64_t> chunk_size;

  bool packed() const { return cu_seqlens.has_value(); }
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

// All that metadata can break.
LinearAttentionParams make_params(const View& q, const View& k, const View& v, const Options& o) {
  const bool packed = o.packed();
  std::optional<View> decay, initial, cu;
  if (o.log_decay) decay.emplace(*o.log_decay);
  if (o.initial_state) initial.emplace(*o.initial_state);
  LinearAttentionParams p{};
  p.map = check_linear_inputs(kOp, q, k, v, decay, o.feature_map, o.scale, packed);
  p.batch = q.size(0);
  if (packed) {
    cu.emplace(*o.cu_seqlens);
    check_cu_seqlens(kOp, "cu_seqlens", *cu, q);
    p.batch = cu->size(0) - 1;
    p.cu_seqlens = cu->data<int32_t>();
  }
  p.heads = q.size(-2);
  p.kv_heads = k.size(-2);
  p.seqlen = q.size(-3);
  p.head_dim = q.size(-1);
  p.value_dim = v.size(-1);
  p.dtype = to_dtype(q.dtype);
  p.normalize = o.normalize;
  p.scale = static_cast<float>(o.scale);
  p.q = rows_of(q, packed);
  p.k = rows_of(k, packed);
  p.v = rows_of(v, packed);
  if (decay) p.decay = log_decay_of(*decay, packed);
  if (initial) {
    const std::vector<int64_t> wanted = state_sizes(p);
    check(initial->sizes == wanted, kOp, "initial_state", Rule("must have shape ", wanted),
          initial->sizes);
    check_state(kOp, "initial_state", *initial, q);
    p.initial = states_of(*initial);
  }
  const int64_t chunk = o.chunk_size.value_or(0);
  const bool power = chunk >= 16 && chunk <= 256 && (chunk & (chunk - 1)) == 0;
  check(!o.chunk_size || power, kOp, "chunk_size", "must be a power of two from 16 to 256", chunk);
  p.chunk_size = chunk;
  return p;
}

void check_values(const View& q, const Options& o) {
  if (q.is_cuda) return;
  if (o.cu_seqlens) check_cu_seqlens_values(kOp, "cu_seqlens", View(*o.cu_seqlens), q.size(0));
  if (o.log_decay) check_decay_values(kOp, View(*o.log_decay));
}

void check_like_out(const View& t, const char* name, const View& q, const View& v) {
  const std::vector<int64_t> wanted = out_sizes(q, v);
  check(t.sizes == wanted, kOp, name, Rule("must have shape ", wanted), t.sizes);
  check(t.dtype == q.dtype, kOp, name, Rule("must have the dtype of q, ", q.dtype), t.dtype);
  check_last_contiguous(kOp, name, t);
  check_device_of_q(kOp, name, t, q);
}

void check_float(const View& t, const char* name, const std::vector<int64_t>& wanted,
                 const View& q) {
  check(t.sizes == wanted, kOp, name, Rule("must have shape ", wanted), t.sizes);
  check(t.dtype == ScalarType::Float && t.tensor.is_contiguous(), kOp, name,
        "must be float32 and contiguous", t.dtype);
  check_device_of_q(kOp, name, t, q);
}

float* float_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

#if defined(TOKENMILL_WITH_CUDA)
LinearAttentionParams& forward_of(LinearAttentionParams& p) { return p; }
LinearAttentionParams& forward_of(LinearAttentionBackwardParams& p) { return p.forward; }

template <typename Params>
void run_cuda(Params& p, const View& q) {
  int64_t floats = 0;
  {
    CudaScope scope(q.device);
    floats = workspace_floats(p);
  }
  Tensor workspace = empty({floats}, q.tensor, ScalarType::Float);
  forward_of(p).workspace = float_data(workspace);
  launch_on_device(kOp, q, p);
}
#endif

void run(LinearAttentionParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return run_cuda(p, q);
#endif
  cpu::linear_attention_forward(p);
}
void run(LinearAttentionBackwardParams& p, const View& q) {
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return run_cuda(p, q);
#endif
  cpu::linear_attention_backward(p);
}

// Writes out; returns final_state and normalizer.
std::tuple<Tensor, Tensor> forward(LinearAttentionParams& p, const View& q, const Tensor& out,
                                   bool return_final_state, bool packed) {
  const View ov(out);
  ov.note(true);
  p.out = rows_of(ov, packed);
  Tensor final_state = empty(return_final_state ? state_sizes(p) : std::vector<int64_t>{0},
                             q.tensor, ScalarType::Float);
  Tensor normalizer = empty(normalizer_sizes(p), q.tensor, ScalarType::Float);
  if (return_final_state) p.final = states_of(View(final_state));
  if (p.normalize) p.normalizer = float_data(normalizer);
  if (p.batch == 0)
    fill(0, out, normalizer);
  else if (out.numel() + final_state.numel() > 0)
    run(p, q);
  return {final_state, normalizer};
}

std::tuple<Tensor, Tensor, Tensor> linear_attention(Tensor q, Tensor k, Tensor v,
                                                    OptTensor log_decay, std::string feature_map,
                                                    double scale, bool normalize,
                                                    OptTensor initial_state,
                                                    bool return_final_state, OptTensor cu_seqlens,
                                                    std::optional<int64_t> chunk_size) {
  const View qv(q), kv(k), vv(v);
  const Options o{log_decay, feature_map, scale, normalize, initial_state, cu_seqlens, chunk_size};
  LinearAttentionParams p = make_params(qv, kv, vv, o);
  check_values(qv, o);
  Tensor out = empty(out_sizes(qv, vv), q);
  auto [final_state, normalizer] = forward(p, qv, out, return_final_state, o.packed());
  return {out, final_state, normalizer};
}

std::tuple<Tensor, Tensor> linear_attention_out(Tensor q, Tensor k, Tensor v, OptTensor log_decay,
                                                std::string feature_map, double scale,
                                                bool normalize, OptTensor initial_state,
                                                bool return_final_state, OptTensor cu_seqlens,
                                                std::optional<int64_t> chunk_size, Tensor out) {
  const View qv(q), kv(k), vv(v);
  const Options o{log_decay, feature_map, scale, normalize, initial_state, cu_seqlens, chunk_size};
  LinearAttentionParams p = make_params(qv, kv, vv, o);
  const View ov(out);
  check_like_out(ov, "out", qv, vv);
  const auto view = [](const OptTensor& t) { return t ? std::optional<View>(*t) : std::nullopt; };
  check_written(kOp, "out", ov,
                {{"q", qv},
                 {"k", kv},
                 {"v", vv},
                 {"log_decay", view(log_decay)},
                 {"initial_state", view(initial_state)},
                 {"cu_seqlens", view(cu_seqlens)}});
  check_values(qv, o);
  return forward(p, qv, out, return_final_state, o.packed());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients linear_attention_backward(OptTensor dout, OptTensor dfinal_state, OptTensor out,
                                    OptTensor normalizer, std::vector<bool> needs, Tensor q,
                                    Tensor k, Tensor v, OptTensor log_decay,
                                    std::string feature_map, double scale, bool normalize,
                                    OptTensor initial_state, OptTensor cu_seqlens,
                                    std::optional<int64_t> chunk_size) {
  const View qv(q), kv(k), vv(v);
  const Options o{log_decay, feature_map, scale, normalize, initial_state, cu_seqlens, chunk_size};
  LinearAttentionBackwardParams p{};
  p.forward = make_params(qv, kv, vv, o);
  LinearAttentionParams& f = p.forward;
  const bool packed = o.packed();
  if (dout) {
    const View t(*dout);
    check_like_out(t, "dout", qv, vv);
    p.dout = rows_of(t, packed);
  }
  if (dfinal_state) {
    const View t(*dfinal_state);
    check_float(t, "dfinal_state", state_sizes(f), qv);
    p.dfinal = states_of(t);
  }
  if (normalize && dout) {
    if (!out || !normalizer)
      fail(kOp, out ? "normalizer" : "out", "must be given with normalize and dout", "None");
    const View ov(*out), nv(*normalizer);
    check_like_out(ov, "out", qv, vv);
    check_float(nv, "normalizer", normalizer_sizes(f), qv);
    f.out = rows_of(ov, packed);
    f.normalizer = float_data(*normalizer);
  }
  check(needs.size() == 2, kOp, "needs", "must have 2 flags (log_decay, initial_state)",
        static_cast<int64_t>(needs.size()));
  check_values(qv, o);

  Tensor dq = empty(qv.sizes, q), dk = empty(kv.sizes, q), dv = empty(vv.sizes, q);
  p.dq = rows_of(View(dq), packed);
  p.dk = rows_of(View(dk), packed);
  p.dv = rows_of(View(dv), packed);
  const bool wants_decay = needs[0] && log_decay, wants_initial = needs[1] && initial_state;
  std::vector<int64_t> decay_sizes{0};
  if (wants_decay && f.decay.per_token)
    decay_sizes.assign(qv.sizes.begin(), qv.sizes.end() - 1);
  else if (wants_decay)
    decay_sizes = {f.batch, f.heads};
  Tensor ddecay = empty(decay_sizes, q, ScalarType::Float);
  Tensor dinitial =
      empty(wants_initial ? state_sizes(f) : std::vector<int64_t>{0}, q, ScalarType::Float);
  if (wants_decay) {
    const View t(ddecay);
    p.ddecay = log_decay_of(t, packed);
    p.ddecay.per_token = f.decay.per_token;
    if (!f.decay.per_token) p.ddecay.batch = t.step(0), p.ddecay.seq = 0;
  }
  if (wants_initial) p.dinitial = states_of(View(dinitial));
  if (f.batch == 0 || f.heads == 0)
    fill(0, dq, dk, dv, ddecay);
  else if (q.numel() + k.numel() + ddecay.numel() + dinitial.numel() > 0)
    run(p, qv);
  return {dq, dk, dv, ddecay, dinitial};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("linear_attention", TOKENMILL_BOX(linear_attention));
  m.impl("linear_attention_out", TOKENMILL_BOX(linear_attention_out));
  m.impl("linear_attention_backward", TOKENMILL_BOX(linear_attention_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("linear_attention", TOKENMILL_BOX(linear_attention));
  m.impl("linear_attention_out", TOKENMILL_BOX(linear_attention_out));
  m.impl("linear_attention_backward", TOKENMILL_BOX(linear_attention_backward));
}
#endif

}  // namespace tokenmill
