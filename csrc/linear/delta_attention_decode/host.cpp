#include "core/stream.h"
#include "core/written.h"
#include "linear/checks.h"
#include "linear/delta_attention_decode/params.h"
#include "linear/request_checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "delta_attention_decode";

struct DeltaAttentionDecodeArgs : Record {
  View q, k, v, beta, state, log_decay;
  Optional<double> scale;
  bool qk_l2norm;
  View state_indices, accepted;
};

Array delta_attention_decode(const DeltaAttentionDecodeArgs& a) {
  const View& decay = a.log_decay;
  check_delta_inputs(kOp, a, false);
  DeltaDecodeParams p{};
  p.batch = a.q.size(0);
  p.seqlen = a.q.size(1);
  p.heads = a.v.size(2);
  p.key_heads = a.q.size(2);
  p.head_dim = a.q.size(3);
  p.value_dim = a.v.size(3);
  check(a.state.dim() == 4 && a.state.size(1) == p.heads && a.state.size(2) == p.head_dim &&
            a.state.size(3) == p.value_dim,
        kOp, "state",
        Rule("must have shape [slots, ", p.heads, ", ", p.head_dim, ", ", p.value_dim, "]"),
        a.state.sizes);
  check_state(kOp, "state", a.state, a.q);
  p.requests = requests_of(kOp, a, p.batch, "q", a.q);
  check_written(kOp, a);
  if (!a.q.is_cuda) {
    if (decay) check_decay_values(kOp, decay);
    check_request_values(kOp, p.requests, p.batch, p.seqlen);
  }
  p.dtype = to_dtype(a.q.dtype);
  p.l2norm = a.qk_l2norm;
  p.scale = static_cast<float>(scale_of(a));
  p.q = rows_of(a.q, false);
  p.k = rows_of(a.k, false);
  p.v = rows_of(a.v, false);
  p.beta = gates_of(a.beta, false);
  p.per_channel = per_channel(a);
  if (decay) p.log_decay = decays_of(decay, false, p.per_channel);
  a.state.note(true);
  p.state = states_of(a.state);
  Array out = empty(a.v.sizes, a.q);
  p.out = rows_of(out, false);
  if (out.numel() == 0) return out;
  if (a.q.is_cuda)
    launch_on_device(kOp, a.q, p);
  else
    cpu::delta_attention_decode(p);
  return out;
}

const Registration kOperators({&implement<delta_attention_decode>("delta_attention_decode")});

}  // namespace
}  // namespace tokenmill
