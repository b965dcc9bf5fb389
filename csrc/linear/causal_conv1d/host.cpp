#include "core/stream.h"
#include "linear/causal_conv1d/params.h"
#include "linear/conv_checks.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "causal_conv1d";

struct CausalConv1dArgs : Record {
  View x, weight, bias;
  std::string_view activation;
  View initial_state;
  bool return_final_state;
  View cu_seqlens;
};

ConvRows conv_rows_of(const View& t, bool packed) {
  return {t.mutable_data(), packed ? 0 : t.step(0), t.step(-2)};
}

std::vector<int64_t> state_sizes(const CausalConv1dParams& p) {
  return {p.batch, p.channels, p.filter.width - 1};
}

// All rules on metadata.
CausalConv1dParams make_params(const CausalConv1dArgs& a) {
  const View& x = a.x;
  const bool packed = bool(a.cu_seqlens);
  const int64_t rank = packed ? 2 : 3;
  const char* layout = packed ? "[T, C] (packed)" : "[B, T, C]";
  check(x.dim() == rank, kOp, "x", Rule("must have ", rank, " dimensions ", layout), x.dim());
  check_dtype(kOp, "x", x);
  check_last_contiguous(kOp, "x", x);
  CausalConv1dParams p{};
  p.filter = conv_filter(kOp, x, a.weight, a.bias, a.activation);
  p.batch = x.size(0);
  if (packed) {
    const View& cu = a.cu_seqlens;
    check(cu.dtype == ScalarType::Int, kOp, "cu_seqlens", "must be int32", cu.dtype);
    check(cu.dim() == 1 && cu.size(0) >= 1, kOp, "cu_seqlens",
          "must have 1 dimension of at least 1 element", cu.sizes);
    check_last_contiguous(kOp, "cu_seqlens", cu);
    check_device_of(kOp, "cu_seqlens", cu, "x", x);
    p.batch = cu.size(0) - 1;
    p.cu_seqlens = cu.data<int32_t>();
  }
  p.seqlen = x.size(-2);
  p.rows = packed ? p.seqlen : p.seqlen * p.batch;
  p.channels = x.size(-1);
  p.dtype = to_dtype(x.dtype);
  p.x = conv_rows_of(x, packed);
  if (!a.initial_state) return p;
  const View& state = a.initial_state;
  const std::vector<int64_t> sizes = state_sizes(p);
  check(state.sizes == sizes, kOp, "initial_state", Rule("must have shape ", sizes), state.sizes);
  check(state.dtype == x.dtype, kOp, "initial_state", Rule("must have the dtype of x, ", x.dtype),
        state.dtype);
  check_device_of(kOp, "initial_state", state, "x", x);
  p.initial = conv_states_of(state);
  return p;
}

void check_values(const CausalConv1dArgs& a) {
  if (!a.x.is_cuda && a.cu_seqlens)
    check_cu_seqlens_values(kOp, "cu_seqlens", a.cu_seqlens, a.x.size(0));
}

std::tuple<Array, Array> causal_conv1d(const CausalConv1dArgs& a) {
  CausalConv1dParams p = make_params(a);
  check_values(a);
  Array out = empty(a.x.sizes, a.x);
  Array state = empty(a.return_final_state ? state_sizes(p) : std::vector<int64_t>{0}, a.x);
  p.out = conv_rows_of(out, p.cu_seqlens);
  if (state.numel() > 0) p.final = conv_states_of(state);
  if (p.batch == 0)
    fill(0, out);
  else if (out.numel() + state.numel() > 0)
    a.x.is_cuda ? launch_on_device(kOp, a.x, p) : cpu::causal_conv1d_forward(p);
  return {out, state};
}

struct CausalConv1dBackwardArgs : Record {
  View dout, dfinal_state;
  bool needs_dinitial_state;
  CausalConv1dArgs forward;
};

std::tuple<Array, Array, Array, Array> causal_conv1d_backward(const CausalConv1dBackwardArgs& a) {
  const CausalConv1dArgs& in = a.forward;
  const View& x = in.x;
  CausalConv1dBackwardParams p{};
  p.forward = make_params(in);
  CausalConv1dParams& f = p.forward;
  const bool packed = f.cu_seqlens;
  if (a.dout) {
    check(a.dout.sizes == x.sizes, kOp, "dout", Rule("must have shape ", x.sizes), a.dout.sizes);
    check(a.dout.dtype == x.dtype, kOp, "dout", Rule("must have the dtype of x, ", x.dtype),
          a.dout.dtype);
    check_last_contiguous(kOp, "dout", a.dout);
    check_device_of(kOp, "dout", a.dout, "x", x);
  }
  if (a.dfinal_state) {
    const View& t = a.dfinal_state;
    check(t.sizes == state_sizes(f), kOp, "dfinal_state", Rule("must have shape ", state_sizes(f)),
          t.sizes);
    check(t.dtype == x.dtype, kOp, "dfinal_state", Rule("must have the dtype of x, ", x.dtype),
          t.dtype);
    check_device_of(kOp, "dfinal_state", t, "x", x);
    if (t.numel() > 0) p.dfinal = conv_states_of(t);
  }
  check_values(in);
  const bool wants_initial = a.needs_dinitial_state && in.initial_state;
  const std::vector<int64_t> nothing{0};
  Array zero_dout;
  if (!a.dout) {
    zero_dout = empty(x.sizes, x);
    fill(0, zero_dout);
  }
  p.dout = conv_rows_of(a.dout ? a.dout : zero_dout, packed);
  Array dx = empty(x.sizes, x), dweight = empty(in.weight.sizes, x, in.weight.dtype);
  Array dbias = empty(in.bias ? in.bias.sizes : Sizes(nothing), x,
                      in.bias ? in.bias.dtype : ScalarType::Float);
  Array dinitial = empty(wants_initial ? state_sizes(f) : nothing, x);
  p.dx = conv_rows_of(dx, packed);
  if (dinitial.numel() > 0) p.dinitial = conv_states_of(dinitial);
  if (f.batch == 0 || f.channels == 0) {
    fill(0, dx, dweight, dbias);
    return {dx, dweight, dbias, dinitial};
  }
  p.part_rows = x.is_cuda ? 64 : 256;
  const int64_t parts = ceil_div(f.rows, p.part_rows);
  Array partial = empty({parts, f.filter.width + 1, f.channels}, x, ScalarType::Float);
  Array dpre = empty({x.is_cuda ? f.rows * f.channels : 0}, x, ScalarType::Float);
  p.parts = partial.mutable_data<float>();
  p.dpre = dpre.mutable_data<float>();
  p.dweight = dweight.mutable_data();
  if (in.bias) p.dbias = dbias.mutable_data();
  x.is_cuda ? launch_on_device(kOp, x, p) : cpu::causal_conv1d_backward(p);
  return {dx, dweight, dbias, dinitial};
}

const Registration kOperators({&implement<causal_conv1d>("causal_conv1d"),
                               &implement<causal_conv1d_backward>("causal_conv1d_backward")});

}  // namespace
}  // namespace tokenmill
