#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "select/block_pool_keys/kernel.cuh"
#include "select/kv_block_scores/kernel.cuh"
#include "select/kv_block_scores/kernel_vote.cuh"

namespace tokenmill {
namespace cuda::kv_block_scores {
namespace {

constexpr int kMaxShared = 96 * 1024;  // per CTA, on every GPU

int64_t round_to_16(int64_t bytes) { return round_up(bytes, 16); }

int64_t mean_bytes(const BlockScoreParams& p) {
  const int64_t size = p.dtype == DType::float32 ? 4 : 2;
  return p.mean_q ? round_to_16(p.batch * p.rows * p.heads * p.head_dim * size) : 0;
}

int64_t vote_pieces(const BlockScoreParams& p) { return ceil_div(p.blocks, kVotePiece); }

// Replaces queries by their means, in the workspace.
template <typename T>
const char* average_queries(BlockScoreParams& p, cudaStream_t stream) {
  PoolParams pool{};
  pool.batch = p.batch;
  pool.kv_heads = p.heads;
  pool.head_dim = p.head_dim;
  pool.block = p.block_q;
  pool.blocks = p.rows;
  pool.mode = PoolMode::mean;
  pool.k = {p.q.data, p.q.batch, p.q.seq, p.q.head, p.queries, nullptr, 0, p.queries, 0};
  pool.out = p.workspace;
  pool.out_head = p.head_dim;
  pool.out_block = p.heads * p.head_dim;
  pool.out_batch = p.rows * pool.out_block;
  p.q = {p.workspace, pool.out_batch, pool.out_block, pool.out_head};
  return launch_pool<T>(pool, stream);
}

template <typename T, int kColumnTiles>
const char* launch_scores(const BlockScoreParams& p, ScorePlan plan, cudaStream_t stream) {
  using Shape = ScoreShape<kColumnTiles>;
  const int whole_sets = plan.set < Shape::kColumns ? Shape::kColumns / plan.set : 1;
  plan.part_columns = whole_sets * plan.set;
  plan.parts = static_cast<int>(ceil_div(plan.columns, plan.part_columns));
  // With enough CTAs to fill a GPU, queries are loaded once for several units.
  const int64_t others = p.batch * p.kv_heads * plan.parts;
  const int64_t rounds = others * ceil_div(plan.units, kScoreWarps) / (16 * multiprocessors());
  plan.rounds = static_cast<int>(rounds < 1 ? 1 : rounds > 8 ? 8 : rounds);
  plan.unit_groups = static_cast<int>(ceil_div(plan.units, kScoreWarps * plan.rounds));
  const int64_t blocks = others * plan.unit_groups, bytes = Shape::shared_bytes(plan.query_bytes);
  if (p.k_dtype == DType::float8_e4m3fn)
    return launch<score_float8_kernel<T, kColumnTiles>>(blocks, kScoreThreads, bytes, stream, p,
                                                        plan);
  return launch<score_kernel<T, kColumnTiles>>(blocks, kScoreThreads, bytes, stream, p, plan);
}

template <typename T>
const char* launch_scores(const BlockScoreParams& p, cudaStream_t stream) {
  if (p.heads == 0) return nullptr;
  const int64_t columns = p.rows * p.heads / p.kv_heads * queries_of_row(p);
  if (p.k.rows > 0x7fffff00)
    return refuse(p.k.table ? "block_table" : "k",
                  "must have at most 2^31 - 256 keys of a request on CUDA", p.k.rows);
  if (columns > 0x7fffff00)
    return refuse("q", "must have at most 2^31 - 256 queries for a key head on CUDA", columns);
  ScorePlan plan{};
  plan.group = static_cast<int>(p.heads / p.kv_heads);
  plan.row_queries = static_cast<int>(queries_of_row(p));
  plan.set = plan.row_queries * (reduces_group(p) ? plan.group : 1);
  plan.columns = static_cast<int>(columns);
  const bool packed = p.block_rows <= kScoreRows / 2 && kScoreRows % p.block_rows == 0;
  plan.slots = packed ? static_cast<int>(kScoreRows / p.block_rows) : 1;
  plan.unit_rows = packed ? kScoreRows : static_cast<int>(p.block_rows);
  plan.units = static_cast<int>(ceil_div(p.k.rows, plan.unit_rows));
  plan.half_chunks = static_cast<int>(ceil_div(p.head_dim * sizeof(T), kChunkBytes));
  plan.chunks = plan.half_chunks * (p.boxes ? 2 : 1);
  plan.slices = static_cast<int>(ceil_div(plan.chunks * kChunkBytes, kSliceBytes));
  plan.query_bytes = (plan.slices | 1) * kSliceBytes;
  plan.keys_aligned =
      p.k_dtype == DType::float8_e4m3fn
          ? is_vectorizable<Float8>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head)
          : is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head, p.k_half);
  plan.queries_aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head);
  constexpr int kWide = 8;
  if (plan.columns > 8 && ScoreShape<kWide>::shared_bytes(plan.query_bytes) <= kMaxShared)
    return launch_scores<T, kWide>(p, plan, stream);
  return launch_scores<T, 1>(p, plan, stream);
}

const char* launch_vote(const BlockScoreParams& p, VotePart* parts, cudaStream_t stream) {
  const int64_t pieces = vote_pieces(p), rows = p.batch * p.heads * p.rows;
  const int64_t column_pieces = ceil_div(p.blocks, kVoteColumns);
  if (const char* error = launch<vote_parts_kernel>(rows * pieces, kVoteThreads, 0, stream, p,
                                                    parts, static_cast<int>(pieces)))
    return error;
  return launch<vote_kernel>(p.batch * p.rows * column_pieces, kVoteThreads, 0, stream, p, parts,
                             static_cast<int>(pieces), static_cast<int>(column_pieces));
}

}  // namespace
}  // namespace cuda::kv_block_scores

int64_t workspace_bytes(const BlockScoreParams& p) {
  int64_t bytes = cuda::kv_block_scores::mean_bytes(p);
  if (p.head_reduce == HeadReduce::softmax_vote)
    bytes += p.batch * p.heads * p.rows * cuda::kv_block_scores::vote_pieces(p) *
             static_cast<int64_t>(sizeof(cuda::kv_block_scores::VotePart));
  return bytes;
}

const char* launch_cuda(const BlockScoreParams& params, void* stream) {
  BlockScoreParams p = params;
  const auto s = static_cast<cudaStream_t>(stream);
  const char* error = cuda::visit_dtype(p.dtype, [&]<typename T>() {
    const char* failed = p.mean_q ? cuda::kv_block_scores::average_queries<T>(p, s) : nullptr;
    return failed ? failed : cuda::kv_block_scores::launch_scores<T>(p, s);
  });
  if (error || p.head_reduce != HeadReduce::softmax_vote) return error;
  char* const parts = static_cast<char*>(p.workspace) + cuda::kv_block_scores::mean_bytes(p);
  return cuda::kv_block_scores::launch_vote(
      p, reinterpret_cast<cuda::kv_block_scores::VotePart*>(parts), s);
}

}  // namespace tokenmill
