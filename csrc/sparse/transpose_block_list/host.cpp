#include "core/stream.h"
#include "sparse/checks.h"
#include "sparse/transpose_block_list/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "transpose_block_list";

void run(TransposeBlockListParams& p, const View& indices) {
  if (indices.is_cuda) return launch_with_workspace(kOp, indices, p, p.workspace);
  cpu::transpose_block_list(p);
}

struct TransposeBlockListArgs : Record {
  View indices, counts;
  int64_t num_blocks;
};

std::tuple<Array, Array> transpose_block_list(const TransposeBlockListArgs& a) {
  TransposeBlockListParams p{};
  p.list = check_list(kOp, a.indices, a.counts, Rule("must have shape [B, heads, rows, K]"),
                      a.indices.dim() == 4, "indices", a.indices);
  check(a.num_blocks >= 0 && a.num_blocks <= int64_t{1} << 30, kOp, "num_blocks",
        "must be 0 to 2^30", a.num_blocks);
  p.batch = a.indices.size(0);
  p.blocks = a.num_blocks;
  Array offsets = empty({p.batch, p.list.heads, a.num_blocks + 1}, a.indices);
  Array rows = empty({p.batch, p.list.heads, p.list.rows * p.list.entries}, a.indices);
  p.offsets = offsets.mutable_data<int32_t>();
  p.rows = rows.mutable_data<int32_t>();
  if (offsets.numel() > 0) run(p, a.indices);
  return {offsets, rows};
}

const Registration kOperators({&implement<transpose_block_list>("transpose_block_list")});

}  // namespace
}  // namespace tokenmill
