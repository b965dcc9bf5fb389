#include "core/stream.h"
#include "core/views.h"
#include "dense/merge_attention_states/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "merge_attention_states";

void check_device(const char* name, const View& t, const View& outs) {
  if (!same_device(t, outs)) fail(kOp, name, "must be on the device of outs", show_device(t));
}

// The checks of python/tokenmill/dense/merge.py, in its order and words.
MergeParams make_params(const View& outs, const View* lses) {
  check(outs.dim() == 5 || outs.dim() == 4, kOp, "outs",
        "must have 5 dimensions [n, B, S, H, D] or 4 [n, T, H, D]", outs.dim());
  check(is_kernel_dtype(outs.dtype), kOp, "outs", "must be float16, bfloat16 or float32",
        outs.dtype);
  check(outs.last_contiguous(), kOp, "outs", "must have a contiguous last dimension; strides",
        outs.strides);
  check(outs.size(0) >= 1, kOp, "outs", "must hold at least one part", outs.size(0));
  MergeParams p{};
  const int64_t b = outs.dim() - 4;  // 0 where packed: no batch dimension
  p.parts = outs.size(0);
  p.batch = b ? outs.size(1) : 1;
  p.seqlen = outs.size(1 + b);
  p.heads = outs.size(2 + b);
  p.dim = outs.size(3 + b);
  p.dtype = to_dtype(outs.dtype);
  p.outs = outs.data();
  p.outs_part = outs.step(0);
  p.outs_batch = b ? outs.step(1) : 0;
  p.outs_seq = outs.step(1 + b);
  p.outs_head = outs.step(2 + b);
  if (lses) {
    std::vector<int64_t> wanted{p.parts};
    if (b) wanted.push_back(p.batch);
    wanted.push_back(p.heads);
    wanted.push_back(p.seqlen);
    check(lses->sizes == wanted, kOp, "lses", Rule("must have shape ", wanted), lses->sizes);
    check(lses->dtype == ScalarType::Float, kOp, "lses", "must be float32", lses->dtype);
    check_device("lses", *lses, outs);
    p.lses = lses->data<float>();
    p.lses_part = lses->step(0);
    p.lses_batch = b ? lses->step(1) : 0;
    p.lses_head = lses->step(1 + b);
    p.lses_seq = lses->step(2 + b);
  }
  return p;
}

std::vector<int64_t> without_front(const std::vector<int64_t>& sizes) {
  return {sizes.begin() + 1, sizes.end()};
}

// Rows without elements have an lse.
template <typename Params, typename Cpu>
void launch(const Params& p, int64_t rows, const View& where, const Cpu& launch_cpu) {
  if (rows == 0) return;
#if defined(TOKENMILL_WITH_CUDA)
  if (where.is_cuda) return launch_on_device(kOp, where, p);
#endif
  launch_cpu(p);
}

std::tuple<Tensor, Tensor> merge_attention_states(Tensor outs, OptTensor lses) {
  const View o(outs);
  const std::optional<View> l = lses ? std::optional<View>(*lses) : std::nullopt;
  MergeParams p = make_params(o, l ? &*l : nullptr);
  Tensor out = empty(without_front(o.sizes), outs);
  Tensor lse =
      empty(l ? without_front(l->sizes) : std::vector<int64_t>{0}, outs, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  launch(p, p.rows(), o, cpu::merge_states);
  return {out, lse};
}

std::tuple<Tensor, Tensor> merge_attention_states_backward(Tensor dout, OptTensor dlse, Tensor outs,
                                                           OptTensor lses) {
  const View o(outs), d(dout);
  const std::optional<View> l = lses ? std::optional<View>(*lses) : std::nullopt;
  MergeBackwardParams p{};
  p.forward = make_params(o, l ? &*l : nullptr);
  const std::vector<int64_t> wanted = without_front(o.sizes);
  check(d.sizes == wanted, kOp, "dout", Rule("must have shape ", wanted), d.sizes);
  check(d.dtype == o.dtype, kOp, "dout", "must have the dtype of outs", d.dtype);
  check(d.last_contiguous(), kOp, "dout", "must have a contiguous last dimension; strides",
        d.strides);
  check_device("dout", d, o);
  const int64_t b = d.dim() - 3;
  p.dout = d.data();
  p.dout_batch = b ? d.step(0) : 0;
  p.dout_seq = d.step(b);
  p.dout_head = d.step(1 + b);
  if (l && dlse) {
    const View v(*dlse);
    check(v.sizes == without_front(l->sizes), kOp, "dlse",
          Rule("must have shape ", without_front(l->sizes)), v.sizes);
    check(v.dtype == ScalarType::Float && dlse->is_contiguous(), kOp, "dlse",
          "must be float32 and contiguous", v.dtype);
    check_device("dlse", v, o);
    p.dlse = v.data<float>();
  }
  Tensor douts = empty(o.sizes, outs);
  Tensor dlses = empty(l ? l->sizes : std::vector<int64_t>{0}, outs, ScalarType::Float);
  p.douts = douts.mutable_data_ptr();
  p.dlses = static_cast<float*>(dlses.mutable_data_ptr());
  launch(p, p.forward.rows(), o, cpu::merge_states_backward);
  return {douts, dlses};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("merge_attention_states", TOKENMILL_BOX(merge_attention_states));
  m.impl("merge_attention_states_backward", TOKENMILL_BOX(merge_attention_states_backward));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("merge_attention_states", TOKENMILL_BOX(merge_attention_states));
  m.impl("merge_attention_states_backward", TOKENMILL_BOX(merge_attention_states_backward));
}
#endif

}  // namespace tokenmill
