// Backwards on the device that find the queries of a block of keys.
#pragma once
#include "core/stream.h"
#include "sparse/transpose_block_list/params.h"

namespace tokenmill {

#if defined(TOKENMILL_WITH_CUDA)
// With the lists of p.forward seen from `blocks` blocks of keys, and workspace.
template <typename Params>
void launch_with_transposed_lists(const char* op, const View& q, Params& p, int64_t blocks) {
  const auto& f = p.forward;
  TransposeBlockListParams t{f.list, f.attention.batch, blocks};
  const auto [sort_bytes, bytes] =
      (CudaScope(q), std::pair(workspace_bytes(t), workspace_bytes(p)));
  const auto take = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return empty(sizes, q, dtype);
  };
  Array offsets = take({t.batch, f.list.heads, t.blocks + 1}, ScalarType::Int);
  Array rows = take({t.batch, f.list.heads, f.list.rows * f.list.entries}, ScalarType::Int);
  Array sort = take({sort_bytes}, ScalarType::Byte);
  Array workspace = take({bytes}, ScalarType::Byte);
  t.offsets = offsets.mutable_data<int32_t>();
  t.rows = rows.mutable_data<int32_t>();
  t.workspace = sort.mutable_data();
  launch_on_device(op, q, t);
  p.offsets = t.offsets;
  p.rows = t.rows;
  p.workspace = workspace.mutable_data();
  launch_on_device(op, q, p);
}
#endif

}  // namespace tokenmill
