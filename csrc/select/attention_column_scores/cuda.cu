#include "select/attention_column_scores/cuda_plan.cuh"
#include "select/attention_column_scores/kernel_reduce.cuh"

namespace tokenmill {
namespace cuda::attention_column_scores {
namespace {

struct ScoreSizes {
  int64_t rows, parts, sums;  // sizes in elements of the buffers of ScorePlan
};

ScoreSizes sizes_of(const ColumnScoresParams& p) {
  const int64_t rows = p.batch * p.heads * p.window_queries;
  const int64_t splits = p.lse ? 0 : split_pass(p, ScorePass::rows).splits;
  return {rows, splits * rows,
          split_pass(p, ScorePass::columns).splits * p.batch * p.heads * p.seqlen_k};
}

int64_t blocks_of(int64_t elements) { return ceil_div(elements, kScoreThreads); }

}  // namespace

template <typename T>
const char* launch_scores(const ColumnScoresParams& p, ScorePlan plan, cudaStream_t stream) {
  const ScoreSizes sizes = sizes_of(p);
  const char* error = p.lse ? nullptr : launch_pass<T>(p, plan, ScorePass::rows, stream);
  if (error) return error;
  plan.splits = static_cast<int>(split_pass(p, ScorePass::rows).splits);
  error = launch<row_statistics_kernel>(blocks_of(sizes.rows), kScoreThreads, 0, stream, p, plan);
  if (!error) error = launch_pass<T>(p, plan, ScorePass::columns, stream);
  if (error) return error;
  plan.splits = static_cast<int>(split_pass(p, ScorePass::columns).splits);
  const int64_t outs = p.head_reduce == HeadReduce::none ? p.heads : p.kv_heads;
  return launch<reduce_columns_kernel>(blocks_of(p.batch * outs * p.seqlen_k), kScoreThreads, 0,
                                       stream, p, plan);
}

}  // namespace cuda::attention_column_scores

int64_t workspace_bytes(const ColumnScoresParams& p) {
  const cuda::attention_column_scores::ScoreSizes sizes =
      cuda::attention_column_scores::sizes_of(p);
  return (sizes.rows + sizes.parts) * sizeof(float2) + sizes.sums * sizeof(float);
}

const char* launch_cuda(const ColumnScoresParams& p, void* stream) {
  const cuda::attention_column_scores::ScoreSizes sizes =
      cuda::attention_column_scores::sizes_of(p);
  cuda::attention_column_scores::ScorePlan plan{};
  plan.factor = p.scale * cuda::kLog2e * (p.inverse_tau > 0 ? p.inverse_tau : 1);
  plan.statistics = static_cast<float2*>(p.workspace);
  plan.parts = plan.statistics + sizes.rows;
  plan.sums = reinterpret_cast<float*>(plan.parts + sizes.parts);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() {
    return cuda::attention_column_scores::launch_scores<T>(p, plan,
                                                           static_cast<cudaStream_t>(stream));
  });
}

}  // namespace tokenmill
