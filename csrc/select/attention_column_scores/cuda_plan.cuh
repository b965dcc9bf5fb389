// Grid of the two passes, and their launch.
#pragma once
#include "cuda/launch.cuh"
#include "select/attention_column_scores/kernel.cuh"

namespace tokenmill::cuda::attention_column_scores {

// CTAs that fill a GPU: with fewer, the streamed dimension is split.
constexpr int64_t kFillingBlocks = 264;
constexpr int64_t kMinSplit = 256;  // minimum streamed rows per split

inline int bucket_of(int64_t head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }

// Rows per CTA: Shape::kBlockRows of the bucket.
inline int64_t block_rows(const ColumnScoresParams& p) {
  const int bucket = bucket_of(p.head_dim);
  return kScoreWarps * (bucket <= (p.dtype == DType::float32 ? 64 : 128) ? 32 : 16);
}

struct ScoreSplit {
  int64_t blocks, splits, per_split;
};

inline ScoreSplit split_pass(const ColumnScoresParams& p, ScorePass pass) {
  const bool rows = pass == ScorePass::rows;
  const int64_t own = rows ? p.window_queries : p.seqlen_k;
  const int64_t streamed = rows ? p.seqlen_k : p.window_queries;
  const int64_t blocks = ceil_div(own, block_rows(p)), all = blocks * p.batch * p.heads;
  int64_t splits = all > 0 ? kFillingBlocks / all : 1;
  const int64_t maximum = ceil_div(streamed, kMinSplit);
  splits = splits > maximum ? maximum : splits;
  splits = splits < 1 ? 1 : splits;
  const int64_t per_split = round_up(ceil_div(streamed, splits), 64);
  return {blocks, splits, per_split > 0 ? per_split : 64};
}

// Compiled once for each element type (kernel.cu).
template <typename T>
const char* launch_pass(const ColumnScoresParams& p, const ScorePlan& plan, ScorePass pass,
                        cudaStream_t stream);

}  // namespace tokenmill::cuda::attention_column_scores
