#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/gather_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "gather_tokens";

// The checks are those of python/tokenmill/tokens/gather_tokens.py, in its order and words.
Tensor gather_tokens(Tensor x, Tensor indices) {
  const View from(x), ids(indices);
  check_movable_tokens(kOp, "x", from);
  const bool flat = ids.dim() == 1;
  check(flat || (ids.dim() == 2 && ids.size(0) == from.size(0)), kOp, "indices",
        Rule("must have shape [", from.size(0), ", K], or [K]"), ids.sizes);
  check(ids.dtype == ScalarType::Int, kOp, "indices", "must be int32", ids.dtype);
  check_last_contiguous(kOp, "indices", ids);
  check_device_of(kOp, "indices", ids, "x", from);

  const int64_t bytes = x.element_size();
  GatherTokensParams p{};
  p.batch = flat ? 1 : ids.size(0);
  p.entries = ids.size(-1);
  p.tokens = from.size(1);
  p.rows = flat ? from.size(0) * p.tokens : p.tokens;
  p.row_bytes = from.size(2) * bytes;
  p.x = from.data<char>();
  p.x_batch = from.step(0) * bytes;
  p.x_token = from.step(1) * bytes;
  // Sequences that follow each other are one.
  p.flat = flat && from.size(0) > 1 && p.x_batch != p.tokens * p.x_token;
  p.indices = ids.data<int32_t>();
  p.indices_batch = flat ? 0 : ids.step(0);
  if (!from.is_cuda) check_index_values(kOp, "indices", ids, p.rows);

  std::vector<int64_t> sizes = ids.sizes;
  sizes.push_back(from.size(2));
  Tensor out = empty(sizes, x);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (out.numel() == 0) return out;
#if defined(TOKENMILL_WITH_CUDA)
  if (from.is_cuda) {
    launch_on_device(kOp, from, p);
    return out;
  }
#endif
  cpu::gather_tokens(p);
  return out;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("gather_tokens", TOKENMILL_BOX(gather_tokens)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("gather_tokens", TOKENMILL_BOX(gather_tokens)); }
#endif

}  // namespace tokenmill
