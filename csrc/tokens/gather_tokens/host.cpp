#include "core/stream.h"
#include "tokens/checks.h"
#include "tokens/gather_tokens/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "gather_tokens";

GatherTokensParams make_params(const View& from, const View& ids) {
  check_movable_tokens(kOp, "x", from);
  const bool flat = ids.dim() == 1;
  check(flat || (ids.dim() == 2 && ids.size(0) == from.size(0)), kOp, "indices",
        Rule("must have shape [", from.size(0), ", K], or [K]"), ids.sizes);
  check(ids.dtype == ScalarType::Int, kOp, "indices", "must be int32", ids.dtype);
  check_last_contiguous(kOp, "indices", ids);
  check_device_of(kOp, "indices", ids, "x", from);

  const int64_t bytes = from.element_bytes;
  GatherTokensParams p{};
  p.batch = flat ? 1 : ids.size(0);
  p.entries = ids.size(-1);
  p.tokens = from.size(1);
  p.rows = flat ? from.size(0) * p.tokens : p.tokens;
  p.row_bytes = from.size(2) * bytes;
  p.x = from.data<char>();
  p.x_batch = from.step(0) * bytes;
  p.x_token = from.step(1) * bytes;
  // Contiguous sequences are treated as one.
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
  from.framework->begin();
  out.note(true);
  if (!from.is_cuda) check_index_values(kOp, "indices", ids, p.rows);
  const int64_t bytes = out.element_bytes;
  p.out = out.mutable_data<char>();
  p.out_batch = p.batch == 1 ? 0 : out.step(0) * bytes;
  p.out_row = out.step(-2) * bytes;
  if (out.numel() == 0) return;
  if (from.is_cuda) return launch_on_device(kOp, from, p);
  cpu::gather_tokens(p);
}

struct GatherTokensArgs : Record {
  View x, indices;
};

Array gather_tokens(const GatherTokensArgs& a) {
  GatherTokensParams p = make_params(a.x, a.indices);
  Array out = empty(out_sizes(a.x, a.indices), a.x);
  run(p, a.x, a.indices, out);
  return out;
}

struct GatherTokensOutArgs : Record {
  GatherTokensArgs forward;
  View out;
};

void gather_tokens_out(const GatherTokensOutArgs& a) {
  const GatherTokensArgs& in = a.forward;
  GatherTokensParams p = make_params(in.x, in.indices);
  check_like(kOp, "out", a.out, out_sizes(in.x, in.indices), in.x.dtype, "x", in.x);
  check_written(kOp, a);
  run(p, in.x, in.indices, a.out);
}

const Registration kOperators({&implement<gather_tokens>("gather_tokens"),
                               &implement<gather_tokens_out>("gather_tokens_out")});

}  // namespace
}  // namespace tokenmill
