#include <algorithm>
#include <cmath>

#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/cluster_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "cluster_tokens";
constexpr int64_t kMaxChannels = 4096, kMaxIters = 1000;

// The checks of python/tokenmill/tokens/cluster.py, in its order and words.
ClusterParams make_params(const View& x, int64_t grid_y, int64_t grid_x, int64_t iters, double tau,
                          int64_t window, bool window_labels) {
  check(x.dim() == 4, kOp, "x", "must have 4 dimensions [B, Y, X, C]", x.dim());
  check(is_kernel_dtype(x.dtype), kOp, "x", "must be float16, bfloat16 or float32", x.dtype);
  check_last_contiguous(kOp, "x", x);
  const int64_t pixels = x.size(0) * x.size(1) * x.size(2), channels = x.size(3);
  check(pixels < int64_t{1} << 31, kOp, "x", "must have fewer than 2^31 pixels in all", pixels);
  check(channels >= 1 && channels <= kMaxChannels, kOp, "x",
        Rule("must have 1 to ", kMaxChannels, " channels"), channels);
  check(grid_y >= 1 && grid_y <= x.size(1), kOp, "grid",
        Rule("must be 1 to ", x.size(1), " along Y"), grid_y);
  check(grid_x >= 1 && grid_x <= x.size(2), kOp, "grid",
        Rule("must be 1 to ", x.size(2), " along X"), grid_x);
  check(iters >= 1 && iters <= kMaxIters, kOp, "iters", Rule("must be 1 to ", kMaxIters), iters);
  check(tau >= 0 && std::isfinite(tau), kOp, "tau", "must be finite and at least 0", tau);
  check(window >= 1 && window % 2 == 1, kOp, "window", "must be odd and at least 1", window);
  ClusterParams p{};
  p.batch = x.size(0);
  p.height = x.size(1);
  p.width = x.size(2);
  p.channels = channels;
  p.grid_y = grid_y;
  p.grid_x = grid_x;
  p.iters = iters;
  p.reach = std::min(window / 2, std::max(grid_y, grid_x));
  p.dtype = to_dtype(x.dtype);
  p.window_labels = window_labels;
  p.tau = static_cast<float>(tau);
  p.x = x.data();
  p.x_batch = x.step(0);
  p.x_line = x.step(1);
  p.x_pixel = x.step(2);
  return p;
}

[[maybe_unused]] ClusterParams& forward_of(ClusterParams& p) { return p; }
[[maybe_unused]] ClusterParams& forward_of(ClusterBackwardParams& p) { return p.forward; }

template <typename Params, typename Cpu>
void run(Params& p, const View& x, const Cpu& launch_cpu) {
  if (x.tensor.numel() == 0) return;
#if defined(TOKENMILL_WITH_CUDA)
  if (x.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, x.tensor, ScalarType::Byte);
    forward_of(p).workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, x, p);
  }
#endif
  launch_cpu(p);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cluster_tokens(Tensor x, int64_t grid_y, int64_t grid_x,
                                                          int64_t iters, double tau, int64_t window,
                                                          bool window_labels) {
  const View v(x);
  ClusterParams p = make_params(v, grid_y, grid_x, iters, tau, window, window_labels);
  const std::vector<int64_t> shape{p.batch, grid_y, grid_x, p.channels};
  Tensor centroids = empty(shape, x);
  Tensor labels = empty({p.batch, p.height, p.width}, x, ScalarType::Int);
  Tensor mass = empty({p.batch, grid_y, grid_x}, x, ScalarType::Float);
  Tensor previous = empty(shape, x, ScalarType::Float);
  p.centroids = centroids.mutable_data_ptr();
  p.labels = static_cast<int32_t*>(labels.mutable_data_ptr());
  p.mass = static_cast<float*>(mass.mutable_data_ptr());
  p.previous = static_cast<float*>(previous.mutable_data_ptr());
  run(p, v, cpu::cluster_tokens);
  return {centroids, labels, mass, previous};
}

Tensor cluster_tokens_backward(Tensor dcentroids, Tensor mass, Tensor previous, Tensor x,
                               int64_t grid_y, int64_t grid_x, int64_t iters, double tau,
                               int64_t window, bool window_labels) {
  const View v(x), d(dcentroids), m(mass), c(previous);
  ClusterBackwardParams p{};
  p.forward = make_params(v, grid_y, grid_x, iters, tau, window, window_labels);
  const std::vector<int64_t> shape{v.size(0), grid_y, grid_x, v.size(3)};
  const auto check_state = [&](const char* name, const View& t, const std::vector<int64_t>& sizes,
                               ScalarType dtype) {
    check_like(kOp, name, t, sizes, dtype, "x", v);
    check(t.tensor.is_contiguous(), kOp, name, "must be contiguous; strides", t.strides);
  };
  check_state("dcentroids", d, shape, v.dtype);
  check_state("mass", m, {v.size(0), grid_y, grid_x}, ScalarType::Float);
  check_state("previous", c, shape, ScalarType::Float);
  p.dcentroids = d.data();
  p.forward.mass = const_cast<float*>(m.data<float>());
  p.forward.previous = const_cast<float*>(c.data<float>());
  Tensor dx = empty(v.sizes, x);
  p.dx = dx.mutable_data_ptr();
  run(p, v, cpu::cluster_tokens_backward);
  return dx;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("cluster_tokens", TOKENMILL_BOX(cluster_tokens));
  m.impl("cluster_tokens_backward", TOKENMILL_BOX(cluster_tokens_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("cluster_tokens", TOKENMILL_BOX(cluster_tokens));
  m.impl("cluster_tokens_backward", TOKENMILL_BOX(cluster_tokens_backward));
}
#endif

}  // namespace tokenmill
