#include "core/stream.h"
#include "core/written.h"
#include "linear/causal_conv1d_decode/params.h"
#include "linear/conv_checks.h"
#include "linear/request_checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "causal_conv1d_decode";

struct CausalConv1dDecodeArgs : Record {
  View x, state, weight, bias;
  std::string_view activation;
  View state_indices, accepted;
};

Array causal_conv1d_decode(const CausalConv1dDecodeArgs& a) {
  const View &x = a.x, &state = a.state;
  ConvDecodeParams p{};
  check(x.dim() == 2 || x.dim() == 3, kOp, "x", "must have 2 or 3 dimensions, [B, C] or [B, T, C]",
        x.dim());
  check_dtype(kOp, "x", x);
  check_last_contiguous(kOp, "x", x);
  p.filter = conv_filter(kOp, x, a.weight, a.bias, a.activation);
  p.batch = x.size(0);
  p.seqlen = x.dim() == 3 ? x.size(1) : 1;
  p.channels = x.size(-1);
  p.dtype = to_dtype(x.dtype);
  const int64_t least = p.filter.width - 1;
  check(state.dim() == 3 && state.size(1) == p.channels && state.size(2) >= least, kOp, "state",
        Rule("must have shape [slots, ", p.channels, ", K] with K of at least ", least),
        state.sizes);
  check(state.dtype == x.dtype, kOp, "state", Rule("must have the dtype of x, ", x.dtype),
        state.dtype);
  check_device_of(kOp, "state", state, "x", x);
  p.columns = state.size(2);
  p.requests = requests_of(kOp, a, p.batch, "x", x);
  check_written(kOp, a);
  if (!x.is_cuda) check_request_values(kOp, p.requests, p.batch, p.seqlen);
  state.note(true);
  p.state = conv_states_of(state);
  const bool tokens = x.dim() == 3;
  const auto rows = [tokens](const View& t) {
    return ConvRows{t.mutable_data(), t.step(0), tokens ? t.step(1) : 0};
  };
  p.x = rows(x);
  Array out = empty(x.sizes, x);
  p.out = rows(out);
  if (out.numel() > 0) x.is_cuda ? launch_on_device(kOp, x, p) : cpu::causal_conv1d_decode(p);
  return out;
}

const Registration kOperators({&implement<causal_conv1d_decode>("causal_conv1d_decode")});

}  // namespace
}  // namespace tokenmill
