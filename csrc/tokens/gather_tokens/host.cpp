#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/gather_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "gather_tokens";

// The checks are those of python/tokenmill/tokens/gather_tokens.py, in its order and words.
GatherTokensParams make_params(const View& from, const View& ids) {
  check_movable_tokens(kOp, "x", from);
  const bool flat = ids.dim() == 1;
  check(flat || (ids.dim() == 2 && ids.size(0) == from.size(0)), kOp, "indices",
        Rule("must have shape [", from.size(0), ", K], or [K]"), ids.sizes);
  check(ids.dtype == ScalarType::Int, kOp, "indices", "must be int32", ids.dtype);
  check_last_contiguous(kOp, "indices", ids);
  check_device_of(kOp, "indices", ids, "x", from);

  const int64_t bytes = from.tensor.element_size();
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
  return p;
}

std::vector<int64_t> out_sizes(const View& from, const View& ids) {
  std::vector<int64_t> sizes = ids.sizes;
  sizes.push_back(from.size(2));
  return sizes;
}

void run(GatherTokensParams& p, const View& from, const View& ids, const View& out) {
  out.note(true);
  if (!from.is_cuda) check_index_values(kOp, "indices", ids, p.rows);
  const int64_t bytes = out.tensor.element_size();
  p.out = out.mutable_data<char>();
  p.out_batch = p.batch == 1 ? 0 : out.step(0) * bytes;
  p.out_row = out.step(-2) * bytes;
  if (out.tensor.numel() == 0) return;
#if defined(TOKENMILL_WITH_CUDA)
  if (from.is_cuda) return launch_on_device(kOp, from, p);
#endif
  cpu::gather_tokens(p);
}

Tensor gather_tokens(Tensor x, Tensor indices) {
  const View from(x), ids(indices);
  GatherTokensParams p = make_params(from, ids);
  Tensor out = empty(out_sizes(from, ids), x);
  run(p, from, ids, View(out));
  return out;
}

void gather_tokens_out(Tensor x, Tensor indices, Tensor out) {
  const View from(x), ids(indices), to(out);
  GatherTokensParams p = make_params(from, ids);
  check_out(kOp, to, out_sizes(from, ids), {{"x", from}, {"indices", ids}});
  run(p, from, ids, to);
}

}  // namespace

TOKENMILL_IMPL(CPU, m) {
  m.impl("gather_tokens", TOKENMILL_BOX(gather_tokens));
  m.impl("gather_tokens_out", TOKENMILL_BOX(gather_tokens_out));
}

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) {
  m.impl("gather_tokens", TOKENMILL_BOX(gather_tokens));
  m.impl("gather_tokens_out", TOKENMILL_BOX(gather_tokens_out));
}
#endif

}  // namespace tokenmill
