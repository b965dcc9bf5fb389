#include "core/stream.h"
#include "core/written.h"
#include "linear/checks.h"
#include "linear/linear_attention_decode/params.h"
#include "linear/request_checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "linear_attention_decode";

void run(LinearDecodeParams& p, const View& q) {
  if (q.is_cuda && p.requests.accepted) return launch_with_workspace(kOp, q, p, p.draft);
  if (q.is_cuda) return launch_on_device(kOp, q, p);
  cpu::linear_attention_decode(p);
}

struct LinearAttentionDecodeArgs : Record {
  View q, k, v, state, log_decay;
  std::string_view feature_map;
  Optional<double> scale;
  bool normalize;
  View state_indices, accepted;
};

Array linear_attention_decode(const LinearAttentionDecodeArgs& a) {
  const View& decay = a.log_decay;
  LinearDecodeParams p{};
  p.map = check_linear_inputs(kOp, a.q, a.k, a.v, decay, a.feature_map, scale_of(a), a.normalize,
                              false);
  p.batch = a.q.size(0);
  p.seqlen = a.q.size(1);
  p.heads = a.q.size(2);
  p.kv_heads = a.k.size(2);
  p.head_dim = a.q.size(3);
  p.value_dim = a.v.size(3);
  const int64_t rows = feature_dim(p.map, p.head_dim), columns = p.value_dim + a.normalize;
  check(a.state.dim() == 4 && a.state.size(1) == p.heads && a.state.size(2) == rows &&
            a.state.size(3) == columns,
        kOp, "state", Rule("must have shape [slots, ", p.heads, ", ", rows, ", ", columns, "]"),
        a.state.sizes);
  check_state(kOp, "state", a.state, a.q);
  p.requests = requests_of(kOp, a, p.batch, "q", a.q);
  check_written(kOp, a);
  if (!a.q.is_cuda) {
    if (decay) check_decay_values(kOp, decay);
    check_request_values(kOp, p.requests, p.batch, p.seqlen);
  }
  p.dtype = to_dtype(a.q.dtype);
  p.normalize = a.normalize;
  p.scale = static_cast<float>(scale_of(a));
  p.q = rows_of(a.q, false);
  p.k = rows_of(a.k, false);
  p.v = rows_of(a.v, false);
  if (decay) p.decay = log_decay_of(decay, false);
  a.state.note(true);
  p.state = states_of(a.state);
  std::vector<int64_t> out_sizes = a.q.sizes;
  out_sizes.back() = p.value_dim;
  Array out = empty(out_sizes, a.q);
  p.out = rows_of(out, false);
  if (out.numel() > 0) run(p, a.q);
  return out;
}

const Registration kOperators({&implement<linear_attention_decode>("linear_attention_decode")});

}  // namespace
}  // namespace tokenmill
