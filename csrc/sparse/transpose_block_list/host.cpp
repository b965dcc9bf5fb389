#include "core/stream.h"
#include "sparse/checks.h"
#include "sparse/transpose_block_list/params.h"

namespace tokenmill {
namespace {

constexpr const char* kOp = "transpose_block_list";

void run(TransposeBlockListParams& p, const View& indices) {
#if defined(TOKENMILL_WITH_CUDA)
  if (indices.is_cuda) {
    Tensor workspace = empty({workspace_bytes(p)}, indices.tensor, ScalarType::Byte);
    p.workspace = workspace.mutable_data_ptr();
    return launch_on_device(kOp, indices, p);
  }
#endif
  cpu::transpose_block_list(p);
}

// The checks are those of python/tokenmill/sparse/transpose_list.py, in its order and words.
std::tuple<Tensor, Tensor> transpose_block_list(Tensor indices, Tensor counts, int64_t num_blocks) {
  const View ids(indices);
  TransposeBlockListParams p{};
  p.list = check_list(kOp, ids, View(counts), Rule("must have shape [B, heads, rows, K]"),
                      ids.dim() == 4, "indices", ids);
  check(num_blocks >= 0 && num_blocks <= int64_t{1} << 30, kOp, "num_blocks", "must be 0 to 2^30",
        num_blocks);
  p.batch = ids.size(0);
  p.blocks = num_blocks;
  Tensor offsets = empty({p.batch, p.list.heads, num_blocks + 1}, indices);
  Tensor rows = empty({p.batch, p.list.heads, p.list.rows * p.list.entries}, indices);
  p.offsets = static_cast<int32_t*>(offsets.mutable_data_ptr());
  p.rows = static_cast<int32_t*>(rows.mutable_data_ptr());
  if (offsets.numel() > 0) run(p, ids);
  return {offsets, rows};
}

}  // namespace

TOKENMILL_IMPL(CPU, m) { m.impl("transpose_block_list", TOKENMILL_BOX(transpose_block_list)); }

#if defined(TOKENMILL_WITH_CUDA)
TOKENMILL_IMPL(CUDA, m) { m.impl("transpose_block_list", TOKENMILL_BOX(transpose_block_list)); }
#endif

}  // namespace tokenmill
