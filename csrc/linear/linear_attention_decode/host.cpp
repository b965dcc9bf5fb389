#include <algorithm>

#include "core/stream.h"
#include "core/written.h"
#include "linear/checks.h"
#include "linear/linear_attention_decode/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "linear_attention_decode";

void check_values(const View& state, const View& decay, const View& indices) {
  if (decay) check_decay_values(kOp, decay);
  if (!indices) return;
  const int32_t* first = indices.data<int32_t>();
  std::vector<int64_t> found(first, first + indices.size(0));
  for (const int64_t i : found)
    check(i >= -1 && i < state.size(0), kOp, "state_indices",
          Rule("must be -1 (skip) or a slot below ", state.size(0)), i);
  std::vector<int64_t> used = found;
  std::sort(used.begin(), used.end());
  const auto begin = std::lower_bound(used.begin(), used.end(), 0);
  check(std::adjacent_find(begin, used.end()) == used.end(), kOp, "state_indices",
        "must not repeat a slot", found);
}

void run(const LinearDecodeParams& p, const View& q) {
  if (q.is_cuda) return launch_on_device(kOp, q, p);
  cpu::linear_attention_decode(p);
}

struct LinearAttentionDecodeArgs : Record {
  View q, k, v, state, log_decay;
  std::string_view feature_map;
  Optional<double> scale;
  bool normalize;
  View state_indices;
};

Array linear_attention_decode(const LinearAttentionDecodeArgs& a) {
  const View &decay = a.log_decay, &indices = a.state_indices;
  LinearDecodeParams p{};
  p.map = check_linear_inputs(kOp, a.q, a.k, a.v, decay, a.feature_map, scale_of(a), false);
  p.batch = a.q.size(0);
  p.seqlen = a.q.size(1);
  p.heads = a.q.size(2);
  p.kv_heads = a.k.size(2);
  p.head_dim = a.q.size(3);
  p.value_dim = a.v.size(3);
  const int64_t rows = feature_dim(p.map, p.head_dim), columns = p.value_dim + a.normalize;
  check(a.state.dim() == 4 && a.state.size(1) == p.heads && a.state.size(2) == rows &&
            a.state.size(3) == columns,
        kOp, "state", Rule("must have shape [slots, ", p.heads, ", ", rows, ", ", columns, "]"),
        a.state.sizes);
  check_state(kOp, "state", a.state, a.q);
  p.slots = a.state.size(0);
  if (indices) {
    check(indices.dtype == ScalarType::Int, kOp, "state_indices", "must be int32", indices.dtype);
    const std::vector<int64_t> wanted{p.batch};
    check(indices.sizes == wanted, kOp, "state_indices", Rule("must have shape ", wanted),
          indices.sizes);
    check_last_contiguous(kOp, "state_indices", indices);
    check_device_of_q(kOp, "state_indices", indices, a.q);
    p.indices = indices.data<int32_t>();
  } else {
    check(p.slots >= p.batch, kOp, "state",
          Rule("must have a slot for each sequence, ", p.batch, ", without state_indices"),
          p.slots);
  }
  check_written(kOp, a);
  if (!a.q.is_cuda) check_values(a.state, decay, indices);
  p.dtype = to_dtype(a.q.dtype);
  p.normalize = a.normalize;
  p.scale = static_cast<float>(scale_of(a));
  p.q = rows_of(a.q, false);
  p.k = rows_of(a.k, false);
  p.v = rows_of(a.v, false);
  if (decay) p.decay = log_decay_of(decay, false);
  a.state.note(true);
  p.state = states_of(a.state);
  std::vector<int64_t> out_sizes = a.q.sizes;
  out_sizes.back() = p.value_dim;
  Array out = empty(out_sizes, a.q);
  p.out = rows_of(out, false);
  if (out.numel() > 0) run(p, a.q);
  return out;
}

const Registration kOperators({&implement<linear_attention_decode>("linear_attention_decode")});

}  // namespace
}  // namespace tokenmill
