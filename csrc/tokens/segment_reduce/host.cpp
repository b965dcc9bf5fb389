#include <iterator>

#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/segment_reduce/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "segment_reduce";
constexpr std::pair<std::string_view, Reduce> kReduces[] = {
    {"sum", Reduce::sum},   {"mean", Reduce::mean},   {"amax", Reduce::amax},
    {"amin", Reduce::amin}, {"first", Reduce::first}, {"last", Reduce::last}};

struct SegmentReduceArgs : Record {
  View x, offsets, perm, weight;
  std::string_view reduce;
};

SegmentReduceParams make_params(const SegmentReduceArgs& a) {
  check_tokens(kOp, "x", a.x);
  const int64_t batch = a.x.size(0), tokens = a.x.size(1);
  check(a.offsets.dim() == 2 && a.offsets.size(0) == batch && a.offsets.size(1) >= 1, kOp,
        "offsets", Rule("must have shape [", batch, ", S + 1]"), a.offsets.sizes);
  check(a.offsets.dtype == ScalarType::Int, kOp, "offsets", "must be int32", a.offsets.dtype);
  check_last_contiguous(kOp, "offsets", a.offsets);
  check_device_of(kOp, "offsets", a.offsets, "x", a.x);
  if (a.perm) check_indices(kOp, "perm", a.perm, batch, "x", a.x);
  const Reduce reduce = choose(kOp, "reduce", kReduces, a.reduce);
  if (a.weight) {
    check_like(kOp, "weight", a.weight, {batch, tokens}, wide_dtype(a.x), "x", a.x);
    check(a.reduce == "sum" || a.reduce == "mean", kOp, "weight",
          "requires reduce 'sum' and 'mean'", a.reduce);
  }
  SegmentReduceParams p{};
  p.batch = batch;
  p.tokens = tokens;
  p.channels = a.x.size(2);
  p.segments = a.offsets.size(1) - 1;
  p.places = a.perm ? a.perm.size(1) : tokens;
  p.dtype = to_dtype(a.x.dtype);
  p.reduce = reduce;
  p.x = a.x.data();
  p.x_batch = a.x.step(0);
  p.x_row = a.x.step(1);
  p.offsets = a.offsets.data<int32_t>();
  p.offsets_batch = a.offsets.step(0);
  if (a.perm) {
    p.perm = a.perm.data<int32_t>();
    p.perm_batch = a.perm.step(0);
  }
  if (a.weight) {
    p.weight = a.weight.data<float>();
    p.weight_batch = a.weight.step(0);
  }
  return p;
}

// Checks of values, CPU only.
void check_values(const SegmentReduceParams& p) {
  std::vector<char> seen(p.perm ? p.tokens : 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* ends = p.offsets + b * p.offsets_batch;
    for (int64_t s = 0; s <= p.segments; ++s) {
      check(ends[s] >= 0 && ends[s] <= p.places, kOp, "offsets", Rule("must be 0 to ", p.places),
            int64_t{ends[s]});
      check(s == 0 || ends[s] >= ends[s - 1], kOp, "offsets", "must not decrease",
            int64_t{ends[s]});
    }
    if (!p.perm) continue;
    const int32_t *perm = p.perm + b * p.perm_batch, *from = perm + ends[0],
                  *until = perm + ends[p.segments];
    for (const int32_t* row = from; row < until; ++row)
      check(*row >= -1 && *row < p.tokens, kOp, "perm", Rule("must be -1 to ", p.tokens - 1),
            int64_t{*row});
    std::fill(seen.begin(), seen.end(), 0);
    int64_t twice = p.tokens;
    for (const int32_t* row = from; row < until; ++row) {
      if (*row < 0) continue;
      if (seen[*row]) twice = std::min<int64_t>(twice, *row);
      seen[*row] = 1;
    }
    check(twice == p.tokens, kOp, "perm", "must not name a token twice", twice);
  }
}

void run(SegmentReduceParams& p, const View& x) {
  if (x.is_cuda) return launch_with_workspace(kOp, x, p, p.workspace);
  cpu::segment_reduce(p);
}

void run(SegmentReduceBackwardParams& q, const View& x) {
  if (x.is_cuda) return launch_on_device(kOp, x, q);
  cpu::segment_reduce_backward(q);
}

std::tuple<Array, Array, Array> segment_reduce(const SegmentReduceArgs& a) {
  SegmentReduceParams p = make_params(a);
  if (!a.x.is_cuda) check_values(p);
  const std::vector<int64_t> shape{p.batch, p.segments, p.channels};
  const bool extreme = p.reduce == Reduce::amax || p.reduce == Reduce::amin;
  Array y = empty(shape, a.x);
  Array weight_sum = empty({p.batch, p.segments}, a.x, ScalarType::Float);
  Array arg = empty(extreme ? shape : std::vector<int64_t>{0}, a.x, ScalarType::Int);
  p.y = y.mutable_data();
  p.weight_sum = weight_sum.mutable_data<float>();
  p.arg = arg.mutable_data<int32_t>();
  if (p.batch * p.segments > 0) run(p, a.x);
  return {y, weight_sum, arg};
}

struct SegmentReduceBackwardArgs : Record {
  View dy, dweight_sum, y, weight_sum, arg;
  bool needs_dweight;
  SegmentReduceArgs forward;
};

std::tuple<Array, Array> segment_reduce_backward(const SegmentReduceBackwardArgs& a) {
  const SegmentReduceArgs& in = a.forward;
  SegmentReduceBackwardParams q{};
  SegmentReduceParams& p = q.forward;
  p = make_params(in);
  if (!in.x.is_cuda) check_values(p);
  const std::vector<int64_t> shape{p.batch, p.segments, p.channels};
  const std::vector<int64_t> of_segments{p.batch, p.segments};
  const auto contiguous = [](const char* name, const View& t) {
    check(t.contiguous(), kOp, name, "must be contiguous; strides", t.strides);
  };
  check_like(kOp, "dy", a.dy, shape, in.x.dtype, "x", in.x);
  check_like(kOp, "y", a.y, shape, in.x.dtype, "x", in.x);
  check_like(kOp, "weight_sum", a.weight_sum, of_segments, ScalarType::Float, "x", in.x);
  contiguous("y", a.y);
  contiguous("weight_sum", a.weight_sum);
  if (a.dweight_sum) {
    check_like(kOp, "dweight_sum", a.dweight_sum, of_segments, ScalarType::Float, "x", in.x);
    contiguous("dweight_sum", a.dweight_sum);
    q.dweight_sum = a.dweight_sum.data<float>();
  }
  if (p.reduce == Reduce::amax || p.reduce == Reduce::amin) {
    check_like(kOp, "arg", a.arg, shape, ScalarType::Int, "x", in.x);
    contiguous("arg", a.arg);
    p.arg = a.arg.mutable_data<int32_t>();
  }
  p.y = a.y.mutable_data();
  p.weight_sum = a.weight_sum.mutable_data<float>();
  q.dy = a.dy.data();
  q.dy_batch = a.dy.step(0);
  q.dy_row = a.dy.step(1);
  Array dx = empty(in.x.sizes, in.x);
  const bool needs_dweight = a.needs_dweight && in.weight;
  Array dweight =
      empty(needs_dweight ? std::vector<int64_t>(in.weight.sizes) : std::vector<int64_t>{0}, in.x,
            ScalarType::Float);
  Array segment_of_row = empty({p.batch, p.tokens}, in.x, ScalarType::Int);
  q.dx = dx.mutable_data();
  if (needs_dweight) q.dweight = dweight.mutable_data<float>();
  q.segment_of_row = segment_of_row.mutable_data<int32_t>();
  if (p.batch * p.tokens > 0) run(q, in.x);
  return {dx, dweight};
}

const Registration kOperators({&implement<segment_reduce>("segment_reduce"),
                               &implement<segment_reduce_backward>("segment_reduce_backward")});

}  // namespace
}  // namespace tokenmill
