#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/refuse.cuh"
#include "select/indexer_topk_select/kernel.cuh"
#include "select/topk_select/params.h"

namespace tokenmill {
namespace cuda::indexer_topk_select {
namespace {

constexpr int kMaxShared = 96 * 1024;                 // per CTA, on every GPU
constexpr int64_t kMaxKeys = 0x7fffff00;              // per request
constexpr int64_t kSpareScores = 8192;                // per query, in addition to topk
constexpr int64_t kMaxScores = 1 << 26;               // per stripe: 256 MB
constexpr int64_t kMinRows = 64, kMaxRows = 1 << 20;  // per stripe
constexpr int64_t kBlocksInTurn = 8;                  // per SM: causal queries have unequal work

int64_t row_scores(const IndexerParams& p) { return round_up(p.k.rows, 4); }

// Rows per stripe, whose scores are all in memory at once: O(topk) per query.
int64_t stripe_rows(const IndexerParams& p) {
  const int64_t scores = std::min(p.tokens * (p.topk + kSpareScores), kMaxScores);
  return std::min(p.tokens, std::clamp(scores / row_scores(p), kMinRows, kMaxRows));
}

TopkParams topk_params(const IndexerParams& p, const ScorePlan& plan) {
  TopkParams topk{};
  topk.rows = plan.rows;
  topk.columns = indexer_blocks(p);
  topk.k = p.topk;
  topk.dtype = DType::float32;
  topk.scores = plan.blocks;
  topk.row_stride = plan.ld;
  topk.lengths = plan.lengths;
  topk.indices = p.indices + plan.first * p.topk;
  topk.counts = p.counts + plan.first;
  topk.values = p.values ? p.values + plan.first * p.topk : nullptr;
  return topk;
}

// Workspace: scores, block maxima, lengths, and the workspace of topk_select.
struct Memory {
  int64_t blocks, lengths, topk, bytes;

  explicit Memory(const IndexerParams& p) {
    const int64_t rows = stripe_rows(p), scores = rows * row_scores(p) * 4;
    blocks = p.block_k > 1 ? scores : 0;
    lengths = blocks + scores;
    topk = round_up(lengths + rows * 4, 16);
    // The last stripe may be shorter, with more CTAs per row.
    bytes = topk;
    for (const int64_t of : {rows, p.tokens % rows}) {
      ScorePlan plan{};
      plan.rows = static_cast<int>(of);
      bytes = std::max(bytes, topk + workspace_bytes(topk_params(p, plan)));
    }
  }
};

template <typename T, typename Key, int kUnits, bool kHeld>
const char* launch_scores(const IndexerParams& p, const ScorePlan& plan, cudaStream_t stream) {
  const int64_t tiles = ceil_div(plan.rows, plan.tile_tokens);
  return launch<indexer_kernel<T, Key, kUnits, kHeld>>(
      tiles * plan.key_groups, kUnits == 1 ? 128 : 256, plan.stages * plan.stage_bytes(), stream, p,
      plan);
}

template <typename T, typename Key>
const char* launch_stripe(const IndexerParams& p, ScorePlan plan, cudaStream_t stream) {
  const int64_t sms = multiprocessors();
  // Queries that share no keys process more keys per CTA instead, so that fewer CTAs load a query.
  const bool apart = p.cu_seqlens_q ? p.tokens <= p.batch : p.queries == 1;
  const auto set_shape = [&](int round_keys, int64_t blocks) {
    // Keys per sequence; a longer sequence is processed in several rounds by its CTAs.
    const int64_t keys = p.cu_seqlens_k ? ceil_div(p.k.rows, p.batch) : p.k.rows;
    const int64_t groups = ceil_div(keys, round_keys), all = plan.rows * groups;
    plan.rounds = 1;
    plan.tile_tokens = 1;
    if (apart)
      plan.rounds = static_cast<int>(std::min(ceil_div(all, blocks), groups));
    else
      plan.tile_tokens = static_cast<int>(std::clamp<int64_t>(all / blocks, 1, kTileTokens));
    const int64_t tiles = ceil_div(plan.rows, plan.tile_tokens);
    plan.key_groups = static_cast<int>(
        std::min(ceil_div(groups, plan.rounds), ceil_div(kBlocksInTurn * blocks, tiles)));
    return all >= blocks;
  };
  const bool held = plan.slices <= kSliceBatch;
  if (held && set_shape(8 * 2 * kUnitKeys, sms))
    return launch_scores<T, Key, 2, true>(p, plan, stream);
  set_shape(4 * kUnitKeys, 2 * sms);
  return held ? launch_scores<T, Key, 1, true>(p, plan, stream)
              : launch_scores<T, Key, 1, false>(p, plan, stream);
}

const char* launch_blocks(const IndexerParams& p, const ScorePlan& plan, cudaStream_t stream) {
  int lanes = 1;
  while (2 * lanes <= p.block_k && lanes < kWarpSize) lanes *= 2;
  const int64_t row_blocks = ceil_div(indexer_blocks(p) * lanes, kBlockThreads);
  return launch<indexer_block_kernel>(plan.rows * row_blocks, kBlockThreads, 0, stream, p, plan,
                                      lanes, static_cast<int>(row_blocks));
}

// Rows of codes are read in pieces of as many bytes as a 16-byte chunk of T has elements.
template <typename T>
bool has_whole_chunks(const KeyRows& k, int64_t dim) {
  constexpr int64_t kCount = kChunkBytes / sizeof(T);
  return reinterpret_cast<uintptr_t>(k.data) % kCount == 0 && dim % kCount == 0 &&
         k.batch % kCount == 0 && k.seq % kCount == 0;
}

template <typename T>
ScorePlan make_plan(const IndexerParams& p) {
  ScorePlan plan{};
  plan.ld = row_scores(p);
  plan.head_tiles = static_cast<int>(ceil_div(p.heads, 8));
  plan.chunks = static_cast<int>(ceil_div(p.head_dim * sizeof(T), kChunkBytes));
  plan.slices = static_cast<int>(ceil_div(plan.chunks * kChunkBytes, kSliceBytes));
  while (kSliceBytes * plan.slices > kChunkBytes << plan.log2_chunks) ++plan.log2_chunks;
  plan.query_bytes = (plan.slices | 1) * kSliceBytes;
  plan.stages = kStages * plan.stage_bytes() <= kMaxShared ? kStages : 1;
  plan.queries_aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head);
  plan.keys_aligned = p.key_dtype == p.dtype
                          ? is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq)
                          : has_whole_chunks<T>(p.k, p.head_dim);
  const Memory memory(p);
  char* const base = static_cast<char*>(p.workspace);
  plan.scores = reinterpret_cast<float*>(base);
  plan.blocks = reinterpret_cast<float*>(base + memory.blocks);
  plan.lengths = reinterpret_cast<int32_t*>(base + memory.lengths);
  return plan;
}

}  // namespace
}  // namespace cuda::indexer_topk_select

int64_t workspace_bytes(const IndexerParams& p) {
  using namespace cuda::indexer_topk_select;
  return p.k.rows > kMaxKeys ? 0 : Memory(p).bytes;
}

const char* launch_cuda(const IndexerParams& p, void* stream) {
  using namespace cuda::indexer_topk_select;
  if (p.k.rows > kMaxKeys)
    return cuda::refuse(p.k.table ? "block_table" : "k",
                        "must have at most 2^31 - 256 keys of a request on CUDA", p.k.rows);
  const auto s = static_cast<cudaStream_t>(stream);
  return cuda::visit_dtype(p.dtype, [&]<typename T>() -> const char* {
    ScorePlan plan = make_plan<T>(p);
    const int64_t stripe = stripe_rows(p);
    for (; plan.first < p.tokens; plan.first += stripe) {
      plan.rows = static_cast<int>(std::min(stripe, p.tokens - plan.first));
      const char* const error = p.key_dtype == p.dtype ? launch_stripe<T, T>(p, plan, s)
                                                       : launch_stripe<T, cuda::Float8>(p, plan, s);
      if (error) return error;
      if (p.block_k > 1)
        if (const char* error = launch_blocks(p, plan, s)) return error;
      TopkParams topk = topk_params(p, plan);
      topk.workspace = static_cast<char*>(p.workspace) + Memory(p).topk;
      if (const char* error = launch_cuda(topk, stream)) return error;
    }
    return nullptr;
  });
}

}  // namespace tokenmill
