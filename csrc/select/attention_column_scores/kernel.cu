// Launches of the two passes.
#include "select/attention_column_scores/cuda_plan.cuh"

namespace tokenmill::cuda::attention_column_scores {

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

template const char* launch_pass<TOKENMILL_ELEMENT>(const ColumnScoresParams&, const ScorePlan&,
                                                    ScorePass, cudaStream_t);

}  // namespace tokenmill::cuda::attention_column_scores
