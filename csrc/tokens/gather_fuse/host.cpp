#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/gather_fuse/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "gather_fuse";

struct GatherFuseArgs : Record {
  View x, keep, rest, weight;
  int64_t prefix;
  bool normalize;
};

GatherFuseParams make_params(const GatherFuseArgs& a) {
  check_tokens(kOp, "x", a.x);
  const int64_t batch = a.x.size(0), tokens = a.x.size(1);
  check(a.prefix >= 0 && a.prefix <= tokens, kOp, "prefix",
        Rule("must be 0 to the number of tokens, ", tokens), a.prefix);
  check_indices(kOp, "keep", a.keep, batch, "x", a.x);
  check_indices(kOp, "rest", a.rest, batch, "x", a.x);
  check_like(kOp, "weight", a.weight, {batch, tokens - a.prefix}, wide_dtype(a.x), "x", a.x);
  GatherFuseParams p{};
  p.batch = batch;
  p.prefix = a.prefix;
  p.patches = tokens - a.prefix;
  p.channels = a.x.size(2);
  p.kept = a.keep.size(1);
  p.rest = a.rest.size(1);
  p.dtype = to_dtype(a.x.dtype);
  p.normalize = a.normalize;
  p.x = a.x.data();
  p.x_batch = a.x.step(0);
  p.x_token = a.x.step(1);
  p.keep_ids = a.keep.data<int32_t>();
  p.rest_ids = a.rest.data<int32_t>();
  p.keep_batch = a.keep.step(0);
  p.rest_batch = a.rest.step(0);
  p.weight = a.weight.data<float>();
  p.weight_batch = a.weight.step(0);
  return p;
}

// CPU: the entry of keep, or of rest, that names each patch, or -1. Returns places.
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

Array empty_places(const GatherFuseParams& p, const View& like) {
  return empty({p.batch, p.patches}, like, ScalarType::Int);
}

std::vector<int64_t> out_sizes(const GatherFuseParams& p) {
  return {p.batch, p.rows(), p.channels};
}

// Writes out; returns weight_sum.
Array forward(GatherFuseParams& p, const View& x, const View& keep, const View& rest,
              const View& out) {
  out.note(true);
  Array weight_sum = empty({p.batch}, x, ScalarType::Float);
  p.out = out.mutable_data();
  p.out_batch = out.step(0);
  p.out_row = out.step(1);
  p.weight_sum = weight_sum.mutable_data<float>();
  if (p.batch == 0) return weight_sum;
  if (x.is_cuda) {
    launch_on_device(kOp, x, p);
    return weight_sum;
  }
  Array places = empty_places(p, x);
  check_values(p, keep, rest, places.mutable_data<int32_t>());
  p.places = places.data<int32_t>();
  cpu::gather_fuse(p);
  return weight_sum;
}

std::tuple<Array, Array> gather_fuse(const GatherFuseArgs& a) {
  GatherFuseParams p = make_params(a);
  Array out = empty(out_sizes(p), a.x);
  Array weight_sum = forward(p, a.x, a.keep, a.rest, out);
  return {out, weight_sum};
}

struct GatherFuseOutArgs : Record {
  GatherFuseArgs forward;
  View out;
};

Array gather_fuse_out(const GatherFuseOutArgs& a) {
  const GatherFuseArgs& in = a.forward;
  GatherFuseParams p = make_params(in);
  check_like(kOp, "out", a.out, out_sizes(p), in.x.dtype, "x", in.x);
  check_written(kOp, a);
  return forward(p, in.x, in.keep, in.rest, a.out);
}

struct GatherFuseBackwardArgs : Record {
  View dout, out, weight_sum;
  GatherFuseArgs forward;
};

std::tuple<Array, Array> gather_fuse_backward(const GatherFuseBackwardArgs& a) {
  const GatherFuseArgs& in = a.forward;
  GatherFuseBackwardParams q{};
  GatherFuseParams& p = q.forward;
  p = make_params(in);
  const std::vector<int64_t> sizes = out_sizes(p);
  check_like(kOp, "dout", a.dout, sizes, in.x.dtype, "x", in.x);
  check_like(kOp, "out", a.out, sizes, in.x.dtype, "x", in.x);
  check_like(kOp, "weight_sum", a.weight_sum, {p.batch}, ScalarType::Float, "x", in.x);
  p.weight_sum = a.weight_sum.mutable_data<float>();
  q.dout = a.dout.data();
  q.dout_batch = a.dout.step(0);
  q.dout_row = a.dout.step(1);
  q.fused_batch = a.out.step(0);
  q.fused = a.out.data<char>() + (p.rows() - 1) * a.out.step(1) * a.out.element_bytes;

  Array places = empty_places(p, in.x);
  Array dx = empty(in.x.sizes, in.x);
  Array dweight = empty({p.batch, p.patches}, in.x, ScalarType::Float);
  q.places = places.mutable_data<int32_t>();
  q.dx = dx.mutable_data();
  q.dweight = dweight.mutable_data<float>();
  if (p.batch * (p.prefix + p.patches) == 0) return {dx, dweight};
  if (in.x.is_cuda) {
    launch_on_device(kOp, in.x, q);
    return {dx, dweight};
  }
  check_values(p, in.keep, in.rest, q.places);
  cpu::gather_fuse_backward(q);
  return {dx, dweight};
}

const Registration kOperators({&implement<gather_fuse>("gather_fuse"),
                               &implement<gather_fuse_out>("gather_fuse_out"),
                               &implement<gather_fuse_backward>("gather_fuse_backward")});

}  // namespace
}  // namespace tokenmill
