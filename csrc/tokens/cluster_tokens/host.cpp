#include <algorithm>
#include <cmath>

#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/cluster_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "cluster_tokens";
constexpr int64_t kMaxIters = 1000;

struct ClusterTokensArgs : Record {
  View x;
  int64_t grid_y, grid_x, iters;
  double tau;
  int64_t window;
  bool window_labels;
};

ClusterParams make_params(const ClusterTokensArgs& a) {
  check(a.x.dim() == 4, kOp, "x", "must have 4 dimensions [B, Y, X, C]", a.x.dim());
  check_dtype(kOp, "x", a.x);
  check_last_contiguous(kOp, "x", a.x);
  const int64_t pixels = a.x.size(0) * a.x.size(1) * a.x.size(2), channels = a.x.size(3);
  check(pixels < int64_t{1} << 31, kOp, "x", "must have fewer than 2^31 pixels in all", pixels);
  check(channels >= 1 && channels <= kMaxClusterChannels, kOp, "x",
        Rule("must have 1 to ", kMaxClusterChannels, " channels"), channels);
  check(a.grid_y >= 1 && a.grid_y <= a.x.size(1), kOp, "grid",
        Rule("must be 1 to ", a.x.size(1), " along Y"), a.grid_y);
  check(a.grid_x >= 1 && a.grid_x <= a.x.size(2), kOp, "grid",
        Rule("must be 1 to ", a.x.size(2), " along X"), a.grid_x);
  check(a.iters >= 1 && a.iters <= kMaxIters, kOp, "iters", Rule("must be 1 to ", kMaxIters),
        a.iters);
  check(a.tau >= 0 && std::isfinite(a.tau), kOp, "tau", "must be finite and at least 0", a.tau);
  check(a.window >= 1 && a.window % 2 == 1, kOp, "window", "must be odd and at least 1", a.window);
  ClusterParams p{};
  p.batch = a.x.size(0);
  p.height = a.x.size(1);
  p.width = a.x.size(2);
  p.channels = channels;
  p.grid_y = a.grid_y;
  p.grid_x = a.grid_x;
  p.iters = a.iters;
  p.reach = std::min(a.window / 2, std::max(a.grid_y, a.grid_x));
  p.dtype = to_dtype(a.x.dtype);
  p.window_labels = a.window_labels;
  p.tau = static_cast<float>(a.tau);
  p.x = a.x.data();
  p.x_batch = a.x.step(0);
  p.x_line = a.x.step(1);
  p.x_pixel = a.x.step(2);
  return p;
}

[[maybe_unused]] ClusterParams& forward_of(ClusterParams& p) { return p; }
[[maybe_unused]] ClusterParams& forward_of(ClusterBackwardParams& p) { return p.forward; }

template <typename Params, typename Cpu>
void run(Params& p, const View& x, const Cpu& launch_cpu) {
  if (x.numel() == 0) return;
  if (x.is_cuda) return launch_with_workspace(kOp, x, p, forward_of(p).workspace);
  launch_cpu(p);
}

std::tuple<Array, Array, Array, Array> cluster_tokens(const ClusterTokensArgs& a) {
  ClusterParams p = make_params(a);
  const std::vector<int64_t> shape{p.batch, a.grid_y, a.grid_x, p.channels};
  Array centroids = empty(shape, a.x);
  Array labels = empty({p.batch, p.height, p.width}, a.x, ScalarType::Int);
  Array mass = empty({p.batch, a.grid_y, a.grid_x}, a.x, ScalarType::Float);
  Array previous = empty(shape, a.x, ScalarType::Float);
  p.centroids = centroids.mutable_data();
  p.labels = labels.mutable_data<int32_t>();
  p.mass = mass.mutable_data<float>();
  p.previous = previous.mutable_data<float>();
  run(p, a.x, cpu::cluster_tokens);
  return {centroids, labels, mass, previous};
}

struct ClusterTokensBackwardArgs : Record {
  View dcentroids, mass, previous;
  ClusterTokensArgs forward;
};

Array cluster_tokens_backward(const ClusterTokensBackwardArgs& a) {
  const ClusterTokensArgs& in = a.forward;
  ClusterBackwardParams p{};
  p.forward = make_params(in);
  const std::vector<int64_t> shape{in.x.size(0), in.grid_y, in.grid_x, in.x.size(3)};
  const auto check_state = [&](const char* name, const View& t, const std::vector<int64_t>& sizes,
                               ScalarType dtype) {
    check_like(kOp, name, t, sizes, dtype, "x", in.x);
    check(t.contiguous(), kOp, name, "must be contiguous; strides", t.strides);
  };
  check_state("dcentroids", a.dcentroids, shape, in.x.dtype);
  check_state("mass", a.mass, {in.x.size(0), in.grid_y, in.grid_x}, ScalarType::Float);
  check_state("previous", a.previous, shape, ScalarType::Float);
  p.dcentroids = a.dcentroids.data();
  p.forward.mass = const_cast<float*>(a.mass.data<float>());
  p.forward.previous = const_cast<float*>(a.previous.data<float>());
  Array dx = empty(in.x.sizes, in.x);
  p.dx = dx.mutable_data();
  run(p, in.x, cpu::cluster_tokens_backward);
  return dx;
}

const Registration kOperators({&implement<cluster_tokens>("cluster_tokens"),
                               &implement<cluster_tokens_backward>("cluster_tokens_backward")});

}  // namespace
}  // namespace tokenmill
