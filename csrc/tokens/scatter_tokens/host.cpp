#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/scatter_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "scatter_tokens";

// Source row of each token. For a token named twice, the message is the one of the checks.
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

struct ScatterTokensArgs : Record {
  View y, indices, base;
  int64_t batch, tokens;
};

Array scatter_tokens(const ScatterTokensArgs& a) {
  check(a.y.dim() == 2 || a.y.dim() == 3, kOp, "y", "must have 3 dimensions [B, K, C], or 2 [K, C]",
        a.y.dim());
  check(is_movable(a.y), kOp, "y", kMovable, a.y.dtype);
  check_last_contiguous(kOp, "y", a.y);
  const std::vector<int64_t> places_sizes(a.y.sizes.begin(), a.y.sizes.end() - 1);
  check(a.indices.sizes == places_sizes, kOp, "indices", Rule("must have shape ", places_sizes),
        a.indices.sizes);
  check(a.indices.dtype == ScalarType::Int, kOp, "indices", "must be int32", a.indices.dtype);
  check_last_contiguous(kOp, "indices", a.indices);
  check_device_of(kOp, "indices", a.indices, "y", a.y);
  constexpr int64_t kMaximum = int64_t{1} << 31;
  check(a.batch >= 0 && a.batch < kMaximum, kOp, "batch", "must be 0 to 2^31 - 1", a.batch);
  check(a.tokens >= 0 && a.tokens < kMaximum, kOp, "base", "must have 0 to 2^31 - 1 tokens",
        a.tokens);
  check(a.batch * a.tokens < kMaximum, kOp, "base", "must have fewer than 2^31 tokens in all",
        a.batch * a.tokens);
  const bool flat = a.y.dim() == 2;
  check(flat || a.y.size(0) == a.batch, kOp, "base",
        Rule("must have the batch size of y, ", a.y.size(0)), a.batch);
  const std::vector<int64_t> sizes{a.batch, a.tokens, a.y.size(-1)};
  if (a.base) {
    check_like(kOp, "base", a.base, sizes, a.y.dtype, "y", a.y);
  }

  const int64_t bytes = a.y.element_bytes;
  ScatterTokensParams p{};
  p.batch = a.batch;
  p.tokens = a.tokens;
  p.sequences = flat ? 1 : a.batch;
  p.entries = a.indices.size(-1);
  p.rows = flat ? a.batch * a.tokens : a.tokens;
  p.row_bytes = a.y.size(-1) * bytes;
  p.y = a.y.data<char>();
  p.y_batch = flat ? 0 : a.y.step(0) * bytes;
  p.y_row = a.y.step(-2) * bytes;
  p.indices = a.indices.data<int32_t>();
  p.indices_batch = flat ? 0 : a.indices.step(0);
  if (a.base) {
    p.base = a.base.data<char>();
    p.base_batch = a.base.step(0) * bytes;
    p.base_token = a.base.step(1) * bytes;
  }
  if (!a.y.is_cuda) check_index_values(kOp, "indices", a.indices, p.rows);
  Array out = empty(sizes, a.y);
  Array places = empty({a.batch, a.tokens}, a.y, ScalarType::Int);
  p.out = out.mutable_data<char>();
  p.places = places.mutable_data<int32_t>();
  if (a.y.is_cuda) {
    if (out.numel() > 0) launch_on_device(kOp, a.y, p);
    return out;
  }
  write_places(p, a.indices);
  if (out.numel() > 0) cpu::scatter_tokens(p);
  return out;
}

const Registration kOperators({&implement<scatter_tokens>("scatter_tokens")});

}  // namespace
}  // namespace tokenmill
