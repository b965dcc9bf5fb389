#include "cuda/launch.cuh"
#include "sparse/transpose_block_list/kernel.cuh"

namespace tokenmill {
namespace cuda::transpose_block_list {
namespace {

constexpr int64_t kMinRows = 16;  // minimum rows per part

int64_t list_heads(const TransposeBlockListParams& p) { return p.batch * p.list.heads; }
int64_t entries_of_head(const TransposeBlockListParams& p) { return p.list.rows * p.list.entries; }

// As many parts as keep memory linear in the entries and the blocks.
TransposePlan make_plan(const TransposeBlockListParams& p) {
  const int64_t maximum = ceil_div(p.list.rows, kMinRows);
  const int64_t linear = p.blocks > 0 ? entries_of_head(p) / p.blocks : 1;
  const int64_t wanted = linear < maximum ? linear : maximum;
  TransposePlan plan{};
  plan.part_rows = static_cast<int>(ceil_div(p.list.rows, wanted > 1 ? wanted : 1));
  plan.parts = plan.part_rows > 0 ? static_cast<int>(ceil_div(p.list.rows, plan.part_rows)) : 1;
  plan.ids = static_cast<int32_t*>(p.workspace);
  plan.places = plan.ids + list_heads(p) * entries_of_head(p);
  return plan;
}

}  // namespace
}  // namespace cuda::transpose_block_list

int64_t workspace_bytes(const TransposeBlockListParams& p) {
  const int64_t places = cuda::transpose_block_list::make_plan(p).parts * p.blocks;
  return cuda::transpose_block_list::list_heads(p) *
         (cuda::transpose_block_list::entries_of_head(p) + places) * 4;
}

const char* launch_cuda(const TransposeBlockListParams& p, void* stream) {
  using namespace cuda;
  using namespace cuda::transpose_block_list;
  const auto s = static_cast<cudaStream_t>(stream);
  const TransposePlan plan = make_plan(p);
  const int64_t heads = list_heads(p), entries = heads * entries_of_head(p);
  const int64_t places = heads * plan.parts * p.blocks * sizeof(int32_t);
  if (const char* error = set_bytes(plan.places, 0, places, s)) return error;
  if (const char* error = set_bytes(p.rows, 0xff, entries * sizeof(int32_t), s))
    return error;  // rows = -1
  if (entries > 0) {
    const int64_t blocks = ceil_div(heads * p.list.rows, kTransposeThreads / kWarpSize);
    if (const char* error = launch<transpose_count_kernel>(blocks < kMaxGrid ? blocks : kMaxGrid,
                                                           kTransposeThreads, 0, s, p, plan))
      return error;
  }
  const char* error = launch<transpose_scan_kernel>(heads, kScanThreads, 0, s, p, plan);
  if (error || entries == 0) return error;
  return launch<transpose_place_kernel>(heads * plan.parts, kTransposeThreads, 0, s, p, plan);
}

}  // namespace tokenmill
