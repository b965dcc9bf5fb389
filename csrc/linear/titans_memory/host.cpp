#include <algorithm>

#include "core/stream.h"
#include "linear/checks.h"
#include "linear/titans_memory/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "titans_memory";

struct TitansArgs : Record {
  View q, k, v, alpha, eta, theta;
  int64_t chunk_size;
  View initial_memory, initial_momentum;
  bool return_final_state;
  View cu_seqlens;

  bool packed() const { return bool(cu_seqlens); }
};

std::vector<int64_t> state_sizes(const TitansParams& p) {
  return {p.batch, p.heads, p.head_dim, p.value_dim};
}

std::vector<int64_t> all_but_last(const View& t) { return {t.sizes.begin(), t.sizes.end() - 1}; }

void check_inputs(const TitansArgs& a) {
  const View &q = a.q, &k = a.k, &v = a.v;
  const int64_t rank = a.packed() ? 3 : 4;
  const char* layout = a.packed() ? "[T, H, D] (packed)" : "[B, S, H, D]";
  check(q.dim() == rank, kOp, "q", Rule("must have ", rank, " dimensions ", layout), q.dim());
  check_dtype(kOp, "q", q);
  check(q.size(-1) > 0, kOp, "q", "must have a head dimension of at least 1", q.size(-1));
  for (auto [name, t] : {std::pair{"k", &k}, std::pair{"v", &v}}) {
    check(t->dtype == q.dtype, kOp, name, Rule("must have the dtype of q, ", q.dtype), t->dtype);
    check_device_of_q(kOp, name, *t, q);
  }
  check(k.sizes == q.sizes, kOp, "k", Rule("must have the shape of q, ", q.sizes), k.sizes);
  const bool beside =
      v.dim() == rank && std::equal(v.sizes.begin(), v.sizes.end() - 1, q.sizes.begin());
  check(beside, kOp, "v", Rule("must have the shape of q up to the head dimension, ", q.sizes),
        v.sizes);
  check(v.size(-1) > 0, kOp, "v", "must have a head dimension of at least 1", v.size(-1));
  for (auto [name, t] : {std::pair{"q", &q}, std::pair{"k", &k}, std::pair{"v", &v}})
    check_last_contiguous(kOp, name, *t);
  const std::vector<int64_t> token = all_but_last(q);
  for (auto [name, t] :
       {std::pair{"alpha", &a.alpha}, std::pair{"eta", &a.eta}, std::pair{"theta", &a.theta}}) {
    const bool floating = is_kernel_dtype(t->dtype) || t->dtype == ScalarType::Double;
    check(floating, kOp, name, "must be a floating-point tensor", t->dtype);
    check_wide(kOp, name, *t, q);
    check(t->sizes == token, kOp, name, Rule("must have shape ", token), t->sizes);
    check_device_of_q(kOp, name, *t, q);
  }
}

// All rules on metadata.
TitansParams make_params(const TitansArgs& a) {
  const bool packed = a.packed();
  check_inputs(a);
  check(a.chunk_size > 0, kOp, "chunk_size", "must be at least 1", a.chunk_size);
  TitansParams p{};
  place_tokens(kOp, p, a);
  p.heads = a.q.size(-2);
  p.chunk_size = std::min(a.chunk_size, std::max<int64_t>(p.seqlen, 1));
  p.alpha = gates_of(a.alpha, packed);
  p.eta = gates_of(a.eta, packed);
  p.theta = gates_of(a.theta, packed);
  const View &memory = a.initial_memory, &momentum = a.initial_momentum;
  if (bool(memory) != bool(momentum))
    fail(kOp, "initial_state", "must be a pair of tensors (M, S) or None", "None");
  if (memory) {
    p.initial_memory = initial_state_of(kOp, memory, state_sizes(p), a.q);
    p.initial_momentum = initial_state_of(kOp, momentum, state_sizes(p), a.q);
  }
  return p;
}

void check_values(const TitansArgs& a) {
  if (!a.q.is_cuda && a.cu_seqlens)
    check_cu_seqlens_values(kOp, "cu_seqlens", a.cu_seqlens, a.q.size(0));
}

void run(TitansParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.workspace);
  cpu::titans_memory_forward(p);
}
void run(TitansBackwardParams& p, const View& q) {
  if (q.is_cuda) return launch_with_workspace(kOp, q, p, p.forward.workspace);
  cpu::titans_memory_backward(p);
}

std::tuple<Array, Array, Array> titans_memory(const TitansArgs& a) {
  TitansParams p = make_params(a);
  check_values(a);
  Array out = empty(a.v.sizes, a.q);
  const std::vector<int64_t> sizes =
      a.return_final_state ? state_sizes(p) : std::vector<int64_t>{0};
  Array memory = empty(sizes, a.q, ScalarType::Float);
  Array momentum = empty(sizes, a.q, ScalarType::Float);
  p.out = rows_of(out, a.packed());
  if (a.return_final_state) p.memory = states_of(memory), p.momentum = states_of(momentum);
  if (p.batch == 0)
    fill(0, out);
  else if (out.numel() + memory.numel() > 0)
    run(p, a.q);
  return {out, memory, momentum};
}

struct TitansBackwardArgs : Record {
  View dout, dmemory, dmomentum;
  bool needs_dinitial_state;
  TitansArgs forward;
};

using Gradients = std::tuple<Array, Array, Array, Array, Array, Array, Array, Array>;

Gradients titans_memory_backward(const TitansBackwardArgs& a) {
  const TitansArgs& in = a.forward;
  TitansBackwardParams p{};
  p.forward = make_params(in);
  TitansParams& f = p.forward;
  const bool packed = in.packed();
  if (a.dout) {
    check_like_out(kOp, "dout", a.dout, in.v.sizes, in.q);
    p.dout = rows_of(a.dout, packed);
  }
  const std::vector<int64_t> state = state_sizes(f);
  if (a.dmemory) check_like_lse(kOp, "dmemory", a.dmemory, state, in.q);
  if (a.dmomentum) check_like_lse(kOp, "dmomentum", a.dmomentum, state, in.q);
  if (a.dmemory) p.dmemory = states_of(a.dmemory);
  if (a.dmomentum) p.dmomentum = states_of(a.dmomentum);
  check_values(in);

  Array dq = empty(in.q.sizes, in.q), dk = empty(in.k.sizes, in.q), dv = empty(in.v.sizes, in.q);
  p.dq = rows_of(dq, packed);
  p.dk = rows_of(dk, packed);
  p.dv = rows_of(dv, packed);
  const std::vector<int64_t> token = all_but_last(in.q);
  Array gates[3];
  for (Array& gate : gates) gate = empty(token, in.q, ScalarType::Float);
  p.dalpha = gates_of(gates[0], packed);
  p.deta = gates_of(gates[1], packed);
  p.dtheta = gates_of(gates[2], packed);
  const bool wants_initial = a.needs_dinitial_state && in.initial_memory;
  const std::vector<int64_t> sizes = wants_initial ? state : std::vector<int64_t>{0};
  Array dmemory = empty(sizes, in.q, ScalarType::Float);
  Array dmomentum = empty(sizes, in.q, ScalarType::Float);
  if (wants_initial)
    p.dinitial_memory = states_of(dmemory), p.dinitial_momentum = states_of(dmomentum);
  if (f.batch == 0)
    fill(0, dq, dk, dv, gates[0], gates[1], gates[2]);
  else if (in.q.numel() + dmemory.numel() > 0)
    run(p, in.q);
  return {dq, dk, dv, gates[0], gates[1], gates[2], dmemory, dmomentum};
}

const Registration kOperators({&implement<titans_memory>("titans_memory"),
                               &implement<titans_memory_backward>("titans_memory_backward")});

}  // namespace
}  // namespace tokenmill
