#include "core/check.h"
#include "core/door.h"
#include "core/stream.h"
#include "dense/merge_attention_states/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "merge_attention_states";

void check_device(const char* name, const View& t, const View& outs) {
  if (!same_device(t, outs)) fail(kOp, name, "must be on the device of outs", show_device(t));
}

MergeParams make_params(const View& outs, const View& lses) {
  check(outs.dim() == 5 || outs.dim() == 4, kOp, "outs",
        "must have 5 dimensions [n, B, S, H, D] or 4 [n, T, H, D]", outs.dim());
  check_dtype(kOp, "outs", outs);
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
    check(lses.sizes == wanted, kOp, "lses", Rule("must have shape ", wanted), lses.sizes);
    check_wide(kOp, "lses", lses, outs);
    check_device("lses", lses, outs);
    p.lses = lses.data<float>();
    p.lses_part = lses.step(0);
    p.lses_batch = b ? lses.step(1) : 0;
    p.lses_head = lses.step(1 + b);
    p.lses_seq = lses.step(2 + b);
  }
  return p;
}

std::vector<int64_t> without_front(const std::vector<int64_t>& sizes) {
  return {sizes.begin() + 1, sizes.end()};
}

// Rows without elements still have an lse.
template <typename Params, typename Cpu>
void launch(const Params& p, int64_t rows, const View& where, const Cpu& launch_cpu) {
  if (rows == 0) return;
  if (where.is_cuda) return launch_on_device(kOp, where, p);
  launch_cpu(p);
}

struct MergeAttentionStatesArgs : Record {
  View outs, lses;
};

std::tuple<Array, Array> merge_attention_states(const MergeAttentionStatesArgs& a) {
  MergeParams p = make_params(a.outs, a.lses);
  Array out = empty(without_front(a.outs.sizes), a.outs);
  Array lse = empty(a.lses ? without_front(a.lses.sizes) : std::vector<int64_t>{0}, a.outs,
                    ScalarType::Float);
  p.out = out.mutable_data();
  p.lse = lse.mutable_data<float>();
  launch(p, p.rows(), a.outs, cpu::merge_states);
  return {out, lse};
}

struct MergeAttentionStatesBackwardArgs : Record {
  View dout, dlse;
  MergeAttentionStatesArgs forward;
};

std::tuple<Array, Array> merge_attention_states_backward(
    const MergeAttentionStatesBackwardArgs& a) {
  const MergeAttentionStatesArgs& in = a.forward;
  MergeBackwardParams p{};
  p.forward = make_params(in.outs, in.lses);
  const std::vector<int64_t> wanted = without_front(in.outs.sizes);
  check(a.dout.sizes == wanted, kOp, "dout", Rule("must have shape ", wanted), a.dout.sizes);
  check(a.dout.dtype == in.outs.dtype, kOp, "dout", "must have the dtype of outs", a.dout.dtype);
  check(a.dout.last_contiguous(), kOp, "dout", "must have a contiguous last dimension; strides",
        a.dout.strides);
  check_device("dout", a.dout, in.outs);
  const int64_t b = a.dout.dim() - 3;
  p.dout = a.dout.data();
  p.dout_batch = b ? a.dout.step(0) : 0;
  p.dout_seq = a.dout.step(b);
  p.dout_head = a.dout.step(1 + b);
  if (in.lses && a.dlse) {
    const View& v = a.dlse;
    check(v.sizes == without_front(in.lses.sizes), kOp, "dlse",
          Rule("must have shape ", without_front(in.lses.sizes)), v.sizes);
    check(v.dtype == ScalarType::Float && v.contiguous(), kOp, "dlse",
          "must be float32 and contiguous", v.dtype);
    check_device("dlse", v, in.outs);
    p.dlse = v.data<float>();
  }
  Array douts = empty(in.outs.sizes, in.outs);
  Array dlses = empty(in.lses ? std::vector<int64_t>(in.lses.sizes) : std::vector<int64_t>{0},
                      in.outs, ScalarType::Float);
  p.douts = douts.mutable_data();
  p.dlses = dlses.mutable_data<float>();
  launch(p, p.forward.rows(), in.outs, cpu::merge_states_backward);
  return {douts, dlses};
}

const Registration kOperators(
    {&implement<merge_attention_states>("merge_attention_states"),
     &implement<merge_attention_states_backward>("merge_attention_states_backward")});

}  // namespace
}  // namespace tokenmill
