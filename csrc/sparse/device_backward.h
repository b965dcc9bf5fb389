// CUDA backwards that find the queries of a key block through transposed lists.
#pragma once
#include "core/parts.h"
#include "core/stream.h"
#include "sparse/transpose_block_list/params.h"

namespace tokenmill {

// Launches p with its lists transposed over `blocks` key blocks, and with workspace. The lists of
// packed requests have no batch dimension.
template <typename Params>
void launch_with_transposed_lists(const char* op, const View& q, Params& p, int64_t blocks) {
  const auto& f = p.forward;
  TransposeBlockListParams t{f.list, f.attention.cu_seqlens_q ? 1 : f.attention.batch, blocks};
  constexpr int64_t kInt = sizeof(int32_t);
  Parts parts;
  const int64_t offsets = parts.add(t.batch * f.list.heads * (t.blocks + 1) * kInt);
  const int64_t rows = parts.add(t.batch * f.list.heads * f.list.rows * f.list.entries * kInt);
  const int64_t sort = parts.add(workspace_on_device(q, t));
  const int64_t workspace = parts.add(workspace_on_device(q, p));
  parts.allocate(q);
  t.offsets = parts.at<int32_t>(offsets);
  t.rows = parts.at<int32_t>(rows);
  t.workspace = parts.at(sort);
  launch_on_device(op, q, t);
  p.offsets = t.offsets;
  p.rows = t.rows;
  p.workspace = parts.at(workspace);
  launch_on_device(op, q, p);
}

}  // namespace tokenmill
