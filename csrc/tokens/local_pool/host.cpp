#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/local_pool/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "local_pool";
constexpr int64_t kMaxTaps = 255, kMaxDilation = 65535;

struct LocalPoolArgs : Record {
  View x, mask;
  int64_t kernel_y, kernel_x, dilation_y, dilation_x;
  std::string_view pooling;
  bool count_include_pad, subtract_input;
};

LocalPoolParams make_params(const LocalPoolArgs& a) {
  check(a.x.dim() == 4, kOp, "x", "must have 4 dimensions [B, Y, X, C], or 3 [B, N, C]", a.x.dim());
  check_dtype(kOp, "x", a.x);
  check_last_contiguous(kOp, "x", a.x);
  const int64_t tokens = a.x.size(0) * a.x.size(1) * a.x.size(2);
  check(tokens < int64_t{1} << 31, kOp, "x", "must have fewer than 2^31 tokens in all", tokens);
  LocalPoolParams p{};
  if (a.mask) {
    check_like(kOp, "mask", a.mask, {a.x.size(0), a.x.size(1), a.x.size(2)}, ScalarType::Bool, "x",
               a.x);
    p.mask = a.mask.data<bool>();
    p.mask_batch = a.mask.step(0);
    p.mask_line = a.mask.step(1);
    p.mask_token = a.mask.step(2);
  }
  for (const int64_t kernel : {a.kernel_y, a.kernel_x})
    check(kernel >= 1 && kernel <= kMaxTaps && kernel % 2 == 1, kOp, "kernel",
          Rule("must be odd, 1 to ", kMaxTaps), kernel);
  for (const int64_t dilation : {a.dilation_y, a.dilation_x})
    check(dilation >= 0 && dilation <= kMaxDilation, kOp, "dilation",
          Rule("must be 0 to ", kMaxDilation), dilation);
  check(a.pooling == "avg" || a.pooling == "max", kOp, "mode", "must be 'avg' or 'max'", a.pooling);
  p.batch = a.x.size(0);
  p.height = static_cast<int>(a.x.size(1));
  p.width = static_cast<int>(a.x.size(2));
  p.channels = a.x.size(3);
  p.kernel_y = static_cast<int>(a.kernel_y);
  p.kernel_x = static_cast<int>(a.kernel_x);
  p.dilation_y = static_cast<int>(a.dilation_y);
  p.dilation_x = static_cast<int>(a.dilation_x);
  p.is_max = a.pooling == "max";
  p.count_include_pad = a.count_include_pad;
  p.subtract_input = a.subtract_input;
  p.dtype = to_dtype(a.x.dtype);
  p.x = a.x.data();
  p.x_batch = a.x.step(0);
  p.x_line = a.x.step(1);
  p.x_token = a.x.step(2);
  return p;
}

template <typename Params, typename Cpu>
void launch(const Params& p, const View& x, const Cpu& launch_cpu) {
  if (x.numel() == 0) return;
  if (x.is_cuda) return launch_on_device(kOp, x, p);
  launch_cpu(p);
}

Array local_pool(const LocalPoolArgs& a) {
  LocalPoolParams p = make_params(a);
  Array out = empty(a.x.sizes, a.x);
  p.out = out.mutable_data();
  launch(p, a.x, cpu::local_pool);
  return out;
}

struct LocalPoolBackwardArgs : Record {
  View dout;
  LocalPoolArgs forward;
};

Array local_pool_backward(const LocalPoolBackwardArgs& a) {
  const LocalPoolArgs& in = a.forward;
  LocalPoolBackwardParams q{};
  q.forward = make_params(in);
  check_like(kOp, "dout", a.dout, in.x.sizes, in.x.dtype, "x", in.x);
  q.dout = a.dout.data();
  q.dout_batch = a.dout.step(0);
  q.dout_line = a.dout.step(1);
  q.dout_token = a.dout.step(2);
  Array dx = empty(in.x.sizes, in.x);
  q.forward.out = dx.mutable_data();
  Array workspace;
  if (in.x.is_cuda) {
    workspace = empty({workspace_on_device(in.x, q)}, in.x, ScalarType::Byte);
    q.workspace = workspace.mutable_data();
  }
  launch(q, in.x, cpu::local_pool_backward);
  return dx;
}

const Registration kOperators({&implement<local_pool>("local_pool"),
                               &implement<local_pool_backward>("local_pool_backward")});

}  // namespace
}  // namespace tokenmill
