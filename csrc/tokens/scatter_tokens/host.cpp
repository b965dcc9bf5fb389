#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/scatter_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "scatter_tokens";

// Where each token comes from. Of a token that is named twice, the message is that of the checks.
void write_places(const ScatterTokensParams& p, const View& ids) {
  std::fill(p.places, p.places + p.batch * p.tokens, -1);
  for (int64_t s = 0; s < p.sequences; ++s)
    for (int64_t k = 0; k < p.entries; ++k) {
      const int64_t id = p.indices[s * p.indices_batch + k];
      if (id < 0) continue;
      int32_t& place = p.places[s * p.rows + id];
      if (place >= 0) check_index_values(kOp, "indices", ids, p.rows, -1, false);
      place = static_cast<int32_t>(k);
    }
}

// The checks are those of python/tokenmill/tokens/scatter_tokens.py, in its order and words.
Tensor scatter_tokens(Tensor y, Tensor indices, OptTensor base, int64_t batch, int64_t tokens) {
  const View rows(y), ids(indices);
  check(rows.dim() == 2 || rows.dim() == 3, kOp, "y",
        "must have 3 dimensions [B, K, C], or 2 [K, C]", rows.dim());
  check(is_movable(rows.dtype), kOp, "y", kMovable, rows.dtype);
  check_last_contiguous(kOp, "y", rows);
  const std::vector<int64_t> places_sizes(rows.sizes.begin(), rows.sizes.end() - 1);
  check(ids.sizes == places_sizes, kOp, "indices", Rule("must have shape ", places_sizes),
        ids.sizes);
  check(ids.dtype == ScalarType::Int, kOp, "indices", "must be int32", ids.dtype);
  check_last_contiguous(kOp, "indices", ids);
  check_device_of(kOp, "indices", ids, "y", rows);
  constexpr int64_t kMost = int64_t{1} << 31;
  check(batch >= 0 && batch < kMost, kOp, "batch", "must be 0 to 2^31 - 1", batch);
  check(tokens >= 0 && tokens < kMost, kOp, "base", "must have 0 to 2^31 - 1 tokens", tokens);
  check(batch * tokens < kMost, kOp, "base", "must have fewer than 2^31 tokens in all",
        batch * tokens);
  const bool flat = rows.dim() == 2;
  check(flat || rows.size(0) == batch, kOp, "base",
        Rule("must have the batch size of y, ", rows.size(0)), batch);
  const std::vector<int64_t> sizes{batch, tokens, rows.size(-1)};
  std::optional<View> under;
  if (base) {
    under.emplace(*base);
    check_like(kOp, "base", *under, sizes, rows.dtype, "y", rows);
  }

  const int64_t bytes = y.element_size();
  ScatterTokensParams p{};
  p.batch = batch;
  p.tokens = tokens;
  p.sequences = flat ? 1 : batch;
  p.entries = ids.size(-1);
  p.rows = flat ? batch * tokens : tokens;
  p.row_bytes = rows.size(-1) * bytes;
  p.y = rows.data<char>();
  p.y_batch = flat ? 0 : rows.step(0) * bytes;
  p.y_row = rows.step(-2) * bytes;
  p.indices = ids.data<int32_t>();
  p.indices_batch = flat ? 0 : ids.step(0);
  if (under) {
    p.base = under->data<char>();
    p.base_batch = under->step(0) * bytes;
    p.base_token = under->step(1) * bytes;
  }
  if (!rows.is_cuda) check_index_values(kOp, "indices", ids, p.rows);
  Tensor out = empty(sizes, y);
  Tensor places = empty({batch, tokens}, y, ScalarType::Int);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.places = static_cast<int32_t*>(places.mutable_data_ptr());
#if defined(TOKENMILL_WITH_CUDA)
  if (rows.is_cuda) {
    if (out.numel() > 0) launch_on_device(kOp, rows, p);
    return out;
  }
#endif
  write_places(p, ids);
  if (out.numel() > 0) cpu::scatter_tokens(p);
  return out;
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("scatter_tokens", TOKENMILL_BOX(scatter_tokens)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("scatter_tokens", TOKENMILL_BOX(scatter_tokens)); }
#endif

}  // namespace tokenmill
