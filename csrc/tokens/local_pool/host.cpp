#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/local_pool/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "local_pool";
constexpr int64_t kMostTaps = 255, kMostDilation = 65535;

// The checks are those of python/tokenmill/tokens/local_pool.py, in its order and words.
LocalPoolParams make_params(const View& x, const std::optional<View>& mask, int64_t kernel_y,
                            int64_t kernel_x, int64_t dilation_y, int64_t dilation_x,
                            const std::string& pooling, bool count_include_pad,
                            bool subtract_input) {
  check(x.dim() == 4, kOp, "x", "must have 4 dimensions [B, Y, X, C], or 3 [B, N, C]", x.dim());
  check(is_kernel_dtype(x.dtype), kOp, "x", "must be float16, bfloat16 or float32", x.dtype);
  check_last_contiguous(kOp, "x", x);
  const int64_t tokens = x.size(0) * x.size(1) * x.size(2);
  check(tokens < int64_t{1} << 31, kOp, "x", "must have fewer than 2^31 tokens in all", tokens);
  LocalPoolParams p{};
  if (mask) {
    check_like(kOp, "mask", *mask, {x.size(0), x.size(1), x.size(2)}, ScalarType::Bool, "x", x);
    p.mask = mask->data<bool>();
    p.mask_batch = mask->step(0);
    p.mask_line = mask->step(1);
    p.mask_token = mask->step(2);
  }
  for (const int64_t kernel : {kernel_y, kernel_x})
    check(kernel >= 1 && kernel <= kMostTaps && kernel % 2 == 1, kOp, "kernel",
          Rule("must be odd, 1 to ", kMostTaps), kernel);
  for (const int64_t dilation : {dilation_y, dilation_x})
    check(dilation >= 0 && dilation <= kMostDilation, kOp, "dilation",
          Rule("must be 0 to ", kMostDilation), dilation);
  check(pooling == "avg" || pooling == "max", kOp, "mode", "must be 'avg' or 'max'", pooling);
  p.batch = x.size(0);
  p.height = static_cast<int>(x.size(1));
  p.width = static_cast<int>(x.size(2));
  p.channels = x.size(3);
  p.kernel_y = static_cast<int>(kernel_y);
  p.kernel_x = static_cast<int>(kernel_x);
  p.dilation_y = static_cast<int>(dilation_y);
  p.dilation_x = static_cast<int>(dilation_x);
  p.is_max = pooling == "max";
  p.count_include_pad = count_include_pad;
  p.subtract_input = subtract_input;
  p.dtype = to_dtype(x.dtype);
  p.x = x.data();
  p.x_batch = x.step(0);
  p.x_line = x.step(1);
  p.x_token = x.step(2);
  return p;
}

std::optional<View> view_of(const OptTensor& t) {
  return t ? std::optional<View>(*t) : std::nullopt;
}

template <typename Params, typename Cpu>
void launch(const Params& p, const View& x, const Cpu& launch_cpu) {
  if (x.tensor.numel() == 0) return;
#if defined(TOKENMILL_WITH_CUDA)
  if (x.is_cuda) return launch_on_device(kOp, x, p);
#endif
  launch_cpu(p);
}

Tensor local_pool(Tensor x, OptTensor mask, int64_t kernel_y, int64_t kernel_x, int64_t dilation_y,
                  int64_t dilation_x, std::string pooling, bool count_include_pad,
                  bool subtract_input) {
  const View from(x);
  LocalPoolParams p = make_params(from, view_of(mask), kernel_y, kernel_x, dilation_y, dilation_x,
                                  pooling, count_include_pad, subtract_input);
  Tensor out = empty(from.sizes, x);
  p.out = out.mutable_data_ptr();
  launch(p, from, cpu::local_pool);
  return out;
}

Tensor local_pool_backward(Tensor dout, Tensor x, OptTensor mask, int64_t kernel_y,
                           int64_t kernel_x, int64_t dilation_y, int64_t dilation_x,
                           std::string pooling, bool count_include_pad, bool subtract_input) {
  const View from(x), d(dout);
  LocalPoolBackwardParams q{};
  q.forward = make_params(from, view_of(mask), kernel_y, kernel_x, dilation_y, dilation_x, pooling,
                          count_include_pad, subtract_input);
  check_like(kOp, "dout", d, from.sizes, from.dtype, "x", from);
  q.dout = d.data();
  q.dout_batch = d.step(0);
  q.dout_line = d.step(1);
  q.dout_token = d.step(2);
  Tensor dx = empty(from.sizes, x);
  q.forward.out = dx.mutable_data_ptr();
#if defined(TOKENMILL_WITH_CUDA)
  std::optional<Tensor> workspace;
  if (from.is_cuda) {
    workspace = empty({workspace_bytes(q)}, x, ScalarType::Byte);
    q.workspace = workspace->mutable_data_ptr();
  }
#endif
  launch(q, from, cpu::local_pool_backward);
  return dx;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("local_pool", TOKENMILL_BOX(local_pool));
  m.impl("local_pool_backward", TOKENMILL_BOX(local_pool_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("local_pool", TOKENMILL_BOX(local_pool));
  m.impl("local_pool_backward", TOKENMILL_BOX(local_pool_backward));
}
#endif

}  // namespace tokenmill
