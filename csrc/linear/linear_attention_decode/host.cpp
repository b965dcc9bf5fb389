#include <algorithm>

#include "core/stream.h"
#include "core/written.h"
#include "linear/checks.h"
#include "linear/linear_attention_decode/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "linear_attention_decode";

void check_values(const View& state, const std::optional<View>& decay,
                  const std::optional<View>& indices) {
  if (decay) check_decay_values(kOp, *decay);
  if (!indices) return;
  const int32_t* first = indices->data<int32_t>();
  std::vector<int64_t> found(first, first + indices->size(0));
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
#if defined(TOKENMILL_WITH_CUDA)
  if (q.is_cuda) return launch_on_device(kOp, q, p);
#endif
  cpu::linear_attention_decode(p);
}

Tensor linear_attention_decode(Tensor q, Tensor k, Tensor v, Tensor state, OptTensor log_decay,
                               std::string feature_map, double scale, bool normalize,
                               OptTensor state_indices) {
  const View qv(q), kv(k), vv(v), sv(state);
  std::optional<View> decay, indices;
  if (log_decay) decay.emplace(*log_decay);
  if (state_indices) indices.emplace(*state_indices);
  LinearDecodeParams p{};
  p.map = check_linear_inputs(kOp, qv, kv, vv, decay, feature_map, scale, false);
  p.batch = qv.size(0);
  p.seqlen = qv.size(1);
  p.heads = qv.size(2);
  p.kv_heads = kv.size(2);
  p.head_dim = qv.size(3);
  p.value_dim = vv.size(3);
  const int64_t rows = feature_dim(p.map, p.head_dim), columns = p.value_dim + normalize;
  check(sv.dim() == 4 && sv.size(1) == p.heads && sv.size(2) == rows && sv.size(3) == columns, kOp,
        "state", Rule("must have shape [slots, ", p.heads, ", ", rows, ", ", columns, "]"),
        sv.sizes);
  check_state(kOp, "state", sv, qv);
  p.slots = sv.size(0);
  if (indices) {
    check(indices->dtype == ScalarType::Int, kOp, "state_indices", "must be int32", indices->dtype);
    const std::vector<int64_t> wanted{p.batch};
    check(indices->sizes == wanted, kOp, "state_indices", Rule("must have shape ", wanted),
          indices->sizes);
    check_last_contiguous(kOp, "state_indices", *indices);
    check_device_of_q(kOp, "state_indices", *indices, qv);
    p.indices = indices->data<int32_t>();
  } else {
    check(p.slots >= p.batch, kOp, "state",
          Rule("must have a slot for each sequence, ", p.batch, ", without state_indices"),
          p.slots);
  }
  check_written(
      kOp, "state", sv,
      {{"q", qv}, {"k", kv}, {"v", vv}, {"log_decay", decay}, {"state_indices", indices}});
  if (!qv.is_cuda) check_values(sv, decay, indices);
  p.dtype = to_dtype(qv.dtype);
  p.normalize = normalize;
  p.scale = static_cast<float>(scale);
  p.q = rows_of(qv, false);
  p.k = rows_of(kv, false);
  p.v = rows_of(vv, false);
  if (decay) p.decay = log_decay_of(*decay, false);
  sv.note(true);
  p.state = states_of(sv);
  std::vector<int64_t> out_sizes = qv.sizes;
  out_sizes.back() = p.value_dim;
  Tensor out = empty(out_sizes, q);
  p.out = rows_of(View(out), false);
  if (out.numel() > 0) run(p, qv);
  return out;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("linear_attention_decode", TOKENMILL_BOX(linear_attention_decode));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("linear_attention_decode", TOKENMILL_BOX(linear_attention_decode));
}
#endif

}  // namespace tokenmill
