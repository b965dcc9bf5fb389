#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/gather_fuse/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "gather_fuse";

// The checks are those of python/tokenmill/tokens/gather_fuse.py, in its order and words.
GatherFuseParams make_params(const View& x, const View& keep, const View& rest, const View& weight,
                             int64_t prefix, bool normalize) {
  check_tokens(kOp, "x", x);
  const int64_t batch = x.size(0), tokens = x.size(1);
  check(prefix >= 0 && prefix <= tokens, kOp, "prefix",
        Rule("must be 0 to the number of tokens, ", tokens), prefix);
  check_indices(kOp, "keep", keep, batch, "x", x);
  check_indices(kOp, "rest", rest, batch, "x", x);
  check_like(kOp, "weight", weight, {batch, tokens - prefix}, ScalarType::Float, "x", x);
  GatherFuseParams p{};
  p.batch = batch;
  p.prefix = prefix;
  p.patches = tokens - prefix;
  p.channels = x.size(2);
  p.kept = keep.size(1);
  p.rest = rest.size(1);
  p.dtype = to_dtype(x.dtype);
  p.normalize = normalize;
  p.x = x.data();
  p.x_batch = x.step(0);
  p.x_token = x.step(1);
  p.keep_ids = keep.data<int32_t>();
  p.rest_ids = rest.data<int32_t>();
  p.keep_batch = keep.step(0);
  p.rest_batch = rest.step(0);
  p.weight = weight.data<float>();
  p.weight_batch = weight.step(0);
  return p;
}

// On the CPU: which entry of keep, then of rest, names each patch, or -1. Returns places.
void check_values(const GatherFuseParams& p, const View& keep, const View& rest, int32_t* places) {
  check_index_values(kOp, "keep", keep, p.patches);
  check_index_values(kOp, "rest", rest, p.patches);
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t* of = places + b * p.patches;
    std::fill(of, of + p.patches, -1);
    int64_t twice = p.patches;
    const auto name = [&](const int32_t* ids, int64_t count, int64_t first) {
      for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0) continue;
        if (of[ids[i]] >= 0) twice = std::min<int64_t>(twice, ids[i]);
        of[ids[i]] = static_cast<int32_t>(first + i);
      }
    };
    name(p.keep_ids + b * p.keep_batch, p.kept, 0);
    name(p.rest_ids + b * p.rest_batch, p.rest, p.kept);
    check(twice == p.patches, kOp, "rest", "must not name a token twice", twice);
  }
}

Tensor empty_places(const GatherFuseParams& p, const Tensor& like) {
  return empty({p.batch, p.patches}, like, ScalarType::Int);
}

std::vector<int64_t> out_sizes(const GatherFuseParams& p) {
  return {p.batch, p.rows(), p.channels};
}

// Writes out; returns weight_sum.
Tensor forward(GatherFuseParams& p, const View& x, const View& keep, const View& rest,
               const View& out) {
  out.note(true);
  Tensor weight_sum = empty({p.batch}, x.tensor, ScalarType::Float);
  p.out = out.mutable_data();
  p.out_batch = out.step(0);
  p.out_row = out.step(1);
  p.weight_sum = static_cast<float*>(weight_sum.mutable_data_ptr());
  if (p.batch == 0) return weight_sum;
#if defined(TOKENMILL_WITH_CUDA)
  if (x.is_cuda) {
    launch_on_device(kOp, x, p);
    return weight_sum;
  }
#endif
  Tensor places = empty_places(p, x.tensor);
  check_values(p, keep, rest, static_cast<int32_t*>(places.mutable_data_ptr()));
  p.places = static_cast<const int32_t*>(places.const_data_ptr());
  cpu::gather_fuse(p);
  return weight_sum;
}

std::tuple<Tensor, Tensor> gather_fuse(Tensor x, Tensor keep, Tensor rest, Tensor weight,
                                       int64_t prefix, bool normalize) {
  const View from(x), k(keep), r(rest), w(weight);
  GatherFuseParams p = make_params(from, k, r, w, prefix, normalize);
  Tensor out = empty(out_sizes(p), x);
  Tensor weight_sum = forward(p, from, k, r, View(out));
  return {out, weight_sum};
}

Tensor gather_fuse_out(Tensor x, Tensor keep, Tensor rest, Tensor weight, int64_t prefix,
                       bool normalize, Tensor out) {
  const View from(x), k(keep), r(rest), w(weight), to(out);
  GatherFuseParams p = make_params(from, k, r, w, prefix, normalize);
  check_out(kOp, to, out_sizes(p), {{"x", from}, {"keep", k}, {"rest", r}, {"weight", w}});
  return forward(p, from, k, r, to);
}

std::tuple<Tensor, Tensor> gather_fuse_backward(Tensor dout, Tensor out, Tensor weight_sum,
                                                Tensor x, Tensor keep, Tensor rest, Tensor weight,
                                                int64_t prefix, bool normalize) {
  const View from(x), k(keep), r(rest), d(dout), o(out), total(weight_sum);
  GatherFuseBackwardParams q{};
  GatherFuseParams& p = q.forward;
  p = make_params(from, k, r, View(weight), prefix, normalize);
  const std::vector<int64_t> sizes = out_sizes(p);
  check_like(kOp, "dout", d, sizes, from.dtype, "x", from);
  check_like(kOp, "out", o, sizes, from.dtype, "x", from);
  check_like(kOp, "weight_sum", total, {p.batch}, ScalarType::Float, "x", from);
  p.weight_sum = total.mutable_data<float>();
  q.dout = d.data();
  q.dout_batch = d.step(0);
  q.dout_row = d.step(1);
  q.fused_batch = o.step(0);
  q.fused = o.data<char>() + (p.rows() - 1) * o.step(1) * out.element_size();

  Tensor places = empty_places(p, x);
  Tensor dx = empty(from.sizes, x);
  Tensor dweight = empty({p.batch, p.patches}, x, ScalarType::Float);
  q.places = static_cast<int32_t*>(places.mutable_data_ptr());
  q.dx = dx.mutable_data_ptr();
  q.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  if (p.batch * (p.prefix + p.patches) == 0) return {dx, dweight};
#if defined(TOKENMILL_WITH_CUDA)
  if (from.is_cuda) {
    launch_on_device(kOp, from, q);
    return {dx, dweight};
  }
#endif
  check_values(p, k, r, q.places);
  cpu::gather_fuse_backward(q);
  return {dx, dweight};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("gather_fuse", TOKENMILL_BOX(gather_fuse));
  m.impl("gather_fuse_out", TOKENMILL_BOX(gather_fuse_out));
  m.impl("gather_fuse_backward", TOKENMILL_BOX(gather_fuse_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("gather_fuse", TOKENMILL_BOX(gather_fuse));
  m.impl("gather_fuse_out", TOKENMILL_BOX(gather_fuse_out));
  m.impl("gather_fuse_backward", TOKENMILL_BOX(gather_fuse_backward));
}
#endif

}  // namespace tokenmill
