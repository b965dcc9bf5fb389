// Chooses the grid and launches the two passes for one element type.
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

template <typename T, int kBucket, ScorePass kPass, bool kNoise>
const char* launch_pass(const ColumnScoresParams& p, ScorePlan plan, cudaStream_t stream) {
  using Shape = ScoreShape<T, kBucket>;
  const ScoreSplit split = split_pass(p, kPass);
  const int64_t blocks = split.blocks * split.splits * p.batch * p.heads;
  plan.blocks = static_cast<unsigned>(split.blocks);
  plan.splits = static_cast<int>(split.splits);
  plan.per_split = static_cast<int>(split.per_split);
  plan.aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head) &&
                 is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head);
  plan.whole = plan.aligned && p.head_dim == kBucket;
  plan.step = TileLoader<T, typename Shape::Tile, Shape::kTileRows>::step(
      kPass == ScorePass::rows ? p.k.seq : p.q.seq, kScoreThreads);
  return launch<column_scores_kernel<T, kBucket, kPass, kNoise>>(
      blocks, kScoreThreads, Shape::kSharedBytes, stream, p, plan);
}

template <typename T, int kBucket>
const char* launch_bucket(const ColumnScoresParams& p, const ScorePlan& plan, ScorePass pass,
                          cudaStream_t stream) {
  const bool noise = p.inverse_tau > 0, rows = pass == ScorePass::rows;
  if (noise)
    return rows ? launch_pass<T, kBucket, ScorePass::rows, true>(p, plan, stream)
                : launch_pass<T, kBucket, ScorePass::columns, true>(p, plan, stream);
  return rows ? launch_pass<T, kBucket, ScorePass::rows, false>(p, plan, stream)
              : launch_pass<T, kBucket, ScorePass::columns, false>(p, plan, stream);
}

template <typename T>
const char* launch_pass(const ColumnScoresParams& p, const ScorePlan& plan, ScorePass pass,
                        cudaStream_t stream) {
  switch (bucket_of(p.head_dim)) {
    case 64:
      return launch_bucket<T, 64>(p, plan, pass, stream);
    case 128:
      return launch_bucket<T, 128>(p, plan, pass, stream);
    default:
      return launch_bucket<T, 256>(p, plan, pass, stream);
  }
}

}  // namespace tokenmill::cuda::attention_column_scores
