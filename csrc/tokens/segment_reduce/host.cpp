#include <iterator>

#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/segment_reduce/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "segment_reduce";
constexpr std::string_view kReduces[] = {"sum", "mean", "amax", "amin", "first", "last"};

// The checks are those of python/tokenmill/tokens/segment_reduce.py, in its order and words.
SegmentReduceParams make_params(const View& x, const View& offsets, const View* perm,
                                const View* weight, const std::string& reduce) {
  check_tokens(kOp, "x", x);
  const int64_t batch = x.size(0), tokens = x.size(1);
  check(offsets.dim() == 2 && offsets.size(0) == batch && offsets.size(1) >= 1, kOp, "offsets",
        Rule("must have shape [", batch, ", S + 1]"), offsets.sizes);
  check(offsets.dtype == ScalarType::Int, kOp, "offsets", "must be int32", offsets.dtype);
  check_last_contiguous(kOp, "offsets", offsets);
  check_device_of(kOp, "offsets", offsets, "x", x);
  if (perm) check_indices(kOp, "perm", *perm, batch, "x", x);
  const auto* name = std::find(std::begin(kReduces), std::end(kReduces), reduce);
  check(name != std::end(kReduces), kOp, "reduce",
        "must be 'sum', 'mean', 'amax', 'amin', 'first' or 'last'", reduce);
  if (weight) {
    check_like(kOp, "weight", *weight, {batch, tokens}, ScalarType::Float, "x", x);
    check(reduce == "sum" || reduce == "mean", kOp, "weight",
          "goes with reduce 'sum' and 'mean' alone", reduce);
  }
  SegmentReduceParams p{};
  p.batch = batch;
  p.tokens = tokens;
  p.channels = x.size(2);
  p.segments = offsets.size(1) - 1;
  p.places = perm ? perm->size(1) : tokens;
  p.dtype = to_dtype(x.dtype);
  p.reduce = static_cast<Reduce>(name - std::begin(kReduces));
  p.x = x.data();
  p.x_batch = x.step(0);
  p.x_row = x.step(1);
  p.offsets = offsets.data<int32_t>();
  p.offsets_batch = offsets.step(0);
  if (perm) {
    p.perm = perm->data<int32_t>();
    p.perm_batch = perm->step(0);
  }
  if (weight) {
    p.weight = weight->data<float>();
    p.weight_batch = weight->step(0);
  }
  return p;
}

// On the CPU alone.
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
    for (const int32_t* row = from; row < until; ++row) {
      if (*row < 0) continue;
      check(!seen[*row], kOp, "perm", "must not name a token twice", int64_t{*row});
      seen[*row] = 1;
    }
  }
}

std::optional<View> view_of(const OptTensor& t) {
  return t ? std::optional<View>(*t) : std::nullopt;
}

void run(SegmentReduceParams& p, const View& x) {
#if defined(TOKENMILL_WITH_CUDA)
  if (x.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, x.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, x, p);
  }
#endif
  cpu::segment_reduce(p);
}

void run(SegmentReduceBackwardParams& q, const View& x) {
#if defined(TOKENMILL_WITH_CUDA)
  if (x.is_cuda) return launch_on_device(kOp, x, q);
#endif
  cpu::segment_reduce_backward(q);
}

std::tuple<Tensor, Tensor, Tensor> segment_reduce(Tensor x, Tensor offsets, OptTensor perm,
                                                  OptTensor weight, std::string reduce) {
  const View rows(x), ends(offsets);
  const std::optional<View> places = view_of(perm), weights = view_of(weight);
  SegmentReduceParams p =
      make_params(rows, ends, places ? &*places : nullptr, weights ? &*weights : nullptr, reduce);
  if (!rows.is_cuda) check_values(p);
  const std::vector<int64_t> shape{p.batch, p.segments, p.channels};
  const bool extreme = p.reduce == Reduce::amax || p.reduce == Reduce::amin;
  Tensor y = empty(shape, x);
  Tensor weight_sum = empty({p.batch, p.segments}, x, ScalarType::Float);
  Tensor arg = empty(extreme ? shape : std::vector<int64_t>{0}, x, ScalarType::Int);
  p.y = y.mutable_data_ptr();
  p.weight_sum = static_cast<float*>(weight_sum.mutable_data_ptr());
  p.arg = static_cast<int32_t*>(arg.mutable_data_ptr());
  if (p.batch * p.segments > 0) run(p, rows);
  return {y, weight_sum, arg};
}

std::tuple<Tensor, Tensor> segment_reduce_backward(Tensor dy, OptTensor dweight_sum, Tensor y,
                                                   Tensor weight_sum, Tensor arg,
                                                   bool needs_dweight, Tensor x, Tensor offsets,
                                                   OptTensor perm, OptTensor weight,
                                                   std::string reduce) {
  const View rows(x), ends(offsets), gradient(dy), result(y), sums(weight_sum), found(arg);
  const std::optional<View> places = view_of(perm), weights = view_of(weight),
                            dsums = view_of(dweight_sum);
  SegmentReduceBackwardParams q{};
  SegmentReduceParams& p = q.forward;
  p = make_params(rows, ends, places ? &*places : nullptr, weights ? &*weights : nullptr, reduce);
  if (!rows.is_cuda) check_values(p);
  const std::vector<int64_t> shape{p.batch, p.segments, p.channels};
  const std::vector<int64_t> of_segments{p.batch, p.segments};
  const auto contiguous = [](const char* name, const View& t) {
    check(t.tensor.is_contiguous(), kOp, name, "must be contiguous; strides", t.strides);
  };
  check_like(kOp, "dy", gradient, shape, rows.dtype, "x", rows);
  check_like(kOp, "y", result, shape, rows.dtype, "x", rows);
  check_like(kOp, "weight_sum", sums, of_segments, ScalarType::Float, "x", rows);
  contiguous("y", result);
  contiguous("weight_sum", sums);
  if (dsums) {
    check_like(kOp, "dweight_sum", *dsums, of_segments, ScalarType::Float, "x", rows);
    contiguous("dweight_sum", *dsums);
    q.dweight_sum = dsums->data<float>();
  }
  if (p.reduce == Reduce::amax || p.reduce == Reduce::amin) {
    check_like(kOp, "arg", found, shape, ScalarType::Int, "x", rows);
    contiguous("arg", found);
    p.arg = found.mutable_data<int32_t>();
  }
  p.y = result.mutable_data();
  p.weight_sum = sums.mutable_data<float>();
  q.dy = gradient.data();
  q.dy_batch = gradient.step(0);
  q.dy_row = gradient.step(1);
  Tensor dx = empty(rows.sizes, x);
  needs_dweight = needs_dweight && weights;
  Tensor dweight =
      empty(needs_dweight ? weights->sizes : std::vector<int64_t>{0}, x, ScalarType::Float);
  Tensor segment_of_row = empty({p.batch, p.tokens}, x, ScalarType::Int);
  q.dx = dx.mutable_data_ptr();
  if (needs_dweight) q.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  q.segment_of_row = static_cast<int32_t*>(segment_of_row.mutable_data_ptr());
  if (p.batch * p.tokens > 0) run(q, rows);
  return {dx, dweight};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("segment_reduce", TOKENMILL_BOX(segment_reduce));
  m.impl("segment_reduce_backward", TOKENMILL_BOX(segment_reduce_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("segment_reduce", TOKENMILL_BOX(segment_reduce));
  m.impl("segment_reduce_backward", TOKENMILL_BOX(segment_reduce_backward));
}
#endif

}  // namespace tokenmill
