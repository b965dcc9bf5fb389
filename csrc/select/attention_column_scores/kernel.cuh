// Two passes over S. A warp owns 16 or 32 rows of one operand, whose fragments stay in registers;
// rows of the other stream through two stages of shared memory. The first pass owns queries and
// computes row_max and row_sum; the second owns keys and accumulates weights. Both may split the
// streamed dimension, depending only on shapes; small kernels combine the splits in order.
#pragma once
#include "attention/qk.cuh"
#include "attention/stage_addresses.cuh"
#include "attention/tile_shape.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/gumbel.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/sequences.cuh"
#include "cuda/warp.cuh"
#include "select/attention_column_scores/params.h"

namespace tokenmill::cuda::attention_column_scores {

enum class ScorePass : int { rows, columns };

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = kScoreWarps * kWarpSize;

template <typename T, int kBucket>
struct ScoreShape : TileShape<T, kBucket> {
  using Tiles = TileShape<T, kBucket>;
  using Tile = typename Tiles::KeyTile;
  static constexpr int kTileRows = Tiles::kTileKeys;
  static constexpr int kOwnTiles = kBucket <= (Tiles::kFloat ? 64 : 128) ? 2 : 1;
  static constexpr int kOwnRows = 16 * kOwnTiles;  // per warp
  static constexpr int kBlockRows = kScoreWarps * kOwnRows;
  static constexpr bool kOwnInRegisters = !Tiles::kFloat || kBucket <= 128;
  static constexpr int kSharedBytes = 2 * Tiles::kTileBytes;
};

struct ScorePlan {
  int splits;          // splits of the streamed dimension
  int per_split;       // streamed rows per split
  unsigned blocks;     // CTAs along the owned dimension, per head
  int64_t step;        // see TileLoader::step
  float factor;        // exponents in log2 units = factor q.k
  bool aligned;        // rows start at multiples of 16 bytes and consist of whole chunks
  bool whole;          // rows also fill the rows of their tiles
  float2* parts;       // [splits, B, H, window] row_max and row_sum of the first pass
  float2* statistics;  // [B, H, window] row_max and weight: P = 2^(t - row_max) weight
  float* sums;         // [splits, B, H, Sk], of the second pass
};

// Owned rows of one warp, and their partial results.
template <typename T, int kBucket, ScorePass kPass, bool kNoise>
class ScoreWarp {
 public:
  using Shape = ScoreShape<T, kBucket>;
  static constexpr int kTiles = Shape::kOwnTiles;
  // Streamed rows per step. The noise of a step is unrolled.
  static constexpr bool kShort = Shape::kFloat || kBucket > 64 || kPass == ScorePass::columns;
  static constexpr int kStep = kNoise ? 8 : kShort ? 16 : 32;
  static_assert(Shape::kTileRows % kStep == 0);

  __device__ ScoreWarp(const ColumnScoresParams& p, const ScorePlan& plan,
                       const ColumnScoresRequest& request, int64_t b, int64_t h, int first, int end)
      : p_(p),
        plan_(plan),
        request_(request),
        own_(kPass == ScorePass::rows
                 ? GlobalRows<T>{rows_at<T>(p.q, b, 0, h), p.q.seq, end,
                                 static_cast<int>(p.head_dim), plan.aligned}
                 : GlobalRows<T>{rows_at<T>(p.k, b, 0, h * p.kv_heads / p.heads), p.k.seq, end,
                                 static_cast<int>(p.head_dim), plan.aligned}),
        b_(static_cast<uint32_t>(b)),
        h_(static_cast<uint32_t>(h)),
        first_(first),
        last_(min(first + Shape::kOwnRows, end) - 1) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      top_[m][0] = top_[m][1] = -kFloatMax;
      sum_[m][0] = sum_[m][1] = 0;
      if constexpr (Shape::kOwnInRegisters)
#pragma unroll
        for (int j = 0; j < Shape::kSlices; ++j) load_own(slices_[m][j], m, j);
    }
  }

  // Range of streamed rows visible to owned row `row`.
  __device__ int begin(int row) const {
    return kPass == ScorePass::rows ? 0 : static_cast<int>(request_.row_begin(row));
  }
  __device__ int end(int row) const {
    return static_cast<int>(kPass == ScorePass::rows ? request_.column_end(row) : request_.rows);
  }

  // Processes the tile of streamed rows from row0 on, at address `tile`.
  __device__ __forceinline__ void add_tile(uint32_t tile, int row0) {
    if (first_ > last_) return;
    Addresses at(tile);
    float sums[kTiles][2] = {};  // second level of accumulation
#pragma unroll 1
    for (int i = 0; i < Shape::kTileRows; i += kStep) {
      const int from = row0 + i;
      if (from < end(last_) && from + kStep > begin(first_)) add_step(at, from, sums);
#pragma unroll
      for (uint32_t& address : at.key) address += kStep * Shape::kRowBytes;
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      sum_[m][0] += sums[m][0];
      sum_[m][1] += sums[m][1];
    }
  }

  // Calls visit(owned row, maximum, sum) from one lane of each quad.
  template <typename Visit>
  __device__ void epilogue(const Visit& visit) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[m][half], top = 0;
        if constexpr (kPass == ScorePass::rows) {
          top = quad_max(top_[m][half]);
          sum *= exp2_approx(top_[m][half] - top);
        }
        sum = quad_sum(sum);
        const int row = first_ + 16 * m + 8 * half + static_cast<int>(threadIdx.x) % kWarpSize / 4;
        if (threadIdx.x % 4 == 0 && row <= last_) visit(row, top, sum);
      }
  }

 private:
  using Addresses = KeyAddresses<Shape>;

  // Rows past the last one repeat it.
  __device__ __forceinline__ void load_own(QuerySlice& to, int m, int slice) const {
    const int lane = threadIdx.x % kWarpSize, chunk = 4 * slice + lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = max(min(first_ + 16 * m + 8 * half + lane / 4, own_.rows - 1), 0);
      const T* from = own_.data + row * own_.stride;
      load_chunk(to.words[half], from, chunk, own_.columns, plan_.whole);
    }
  }

  __device__ __forceinline__ void add_step(const Addresses& at, int from,
                                           float (&sums)[kTiles][2]) {
    float2 statistic[kStep / 8][2];
    if constexpr (kPass == ScorePass::columns) load_statistics(statistic, from);
    // t = factor Q K^T, plus noise / tau if kNoise
    float t[kTiles][kStep / 8][4];
    multiply_step(t, at);
    each_pair(from, [&](int m, int n, int i, int own, int streamed) {
      t[m][n][i] *= plan_.factor;
      if constexpr (kNoise) t[m][n][i] = fmaf(noise(own, streamed), p_.inverse_tau, t[m][n][i]);
    });
    // columns: P = 2^(t - row_max) weight
    if constexpr (kPass == ScorePass::columns) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            t[m][n][i] = exp2_approx(t[m][n][i] - statistic[n][i % 2].x) * statistic[n][i % 2].y;
    }
    // Also replaces the NaN of pairs in which the row does not exist.
    if (from < begin(last_) || from + kStep > end(first_))
      each_pair(from, [&](int m, int n, int i, int own, int streamed) {
        if (streamed < begin(own) || streamed >= end(own))
          t[m][n][i] = kPass == ScorePass::rows ? -infinity() : 0;
      });
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // rows: row_max = max(row_max, t), rescale row_sum
        if constexpr (kPass == ScorePass::rows) {
          float top = top_[m][half];
#pragma unroll
          for (int n = 0; n < kStep / 8; ++n)
            top = fmaxf(top, fmaxf(t[m][n][2 * half], t[m][n][2 * half + 1]));
          const float shrink = exp2_approx(top_[m][half] - top);
          top_[m][half] = top;
          sum_[m][half] *= shrink;
          sums[m][half] *= shrink;
        }
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float x = t[m][n][2 * half + i];
            sums[m][half] += kPass == ScorePass::rows ? exp2_approx(x - top_[m][half]) : x;
          }
      }
  }

  __device__ __forceinline__ void load_statistics(float2 (&to)[kStep / 8][2], int from) const {
    const int first = static_cast<int>(request_.first_row);
    const int last = static_cast<int>(request_.rows) - 1;
    const float2* all = plan_.statistics + (b_ * p_.heads + h_) * p_.window_queries;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = from + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + i;
        to[n][i] = all[min(row, last) - first];
      }
  }

  __device__ __forceinline__ void multiply_step(float (&t)[kTiles][kStep / 8][4],
                                                const Addresses& at) const {
    if constexpr (Shape::kOwnInRegisters)
      multiply_held<T, Shape::kSlices, 0>(t, at, [&](int m, auto j) { return slices_[m][j]; });
    else
      multiply_loaded<T, Shape::kSlices, 0>(
          t, at,
          [&](int m, auto j, int i) {
            QuerySlice own;
            load_own(own, m, i + j);
            return own;
          },
          [] {});
  }

  // Calls visit(owned tile, streamed tile, i, owned row, streamed row) for this lane's
  // accumulators.
  template <typename Visit>
  __device__ __forceinline__ void each_pair(int from, const Visit& visit) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          visit(m, n, i, first_ + 16 * m + 8 * (i / 2) + lane / 4,
                from + 8 * n + 2 * (lane % 4) + i % 2);
  }

  __device__ __forceinline__ float noise(int own, int streamed) const {
    const int query = kPass == ScorePass::rows ? own : streamed;
    const int key = kPass == ScorePass::rows ? streamed : own;
    const auto position = static_cast<uint32_t>(query + request_.diagonal);
    return gumbel_bits(philox(p_.seed, b_, h_, position, static_cast<uint32_t>(key)));
  }

  const ColumnScoresParams& p_;
  const ScorePlan& plan_;
  const ColumnScoresRequest& request_;
  GlobalRows<T> own_;
  uint32_t b_, h_;
  int first_, last_;
  QuerySlice slices_[Shape::kOwnInRegisters ? kTiles : 1]
                    [Shape::kOwnInRegisters ? Shape::kSlices : 1];
  float top_[kTiles][2], sum_[kTiles][2];  // partial results of this lane
};

// Without a minimum number of CTAs ptxas spills a few bytes to fit one more.
template <typename T, int kBucket, ScorePass kPass, bool kNoise>
__global__ void __launch_bounds__(kScoreThreads, 3)
    column_scores_kernel(const __grid_constant__ ColumnScoresParams p,
                         const __grid_constant__ ScorePlan plan) {
  using Shape = ScoreShape<T, kBucket>;
  using Loader = TileLoader<T, typename Shape::Tile, Shape::kTileRows>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int split = blockIdx.x % plan.splits;
  const unsigned block = blockIdx.x / plan.splits % plan.blocks;
  const int64_t bh = blockIdx.x / plan.splits / plan.blocks;
  const int64_t b = bh / p.heads, h = bh % p.heads;
  const ColumnScoresRequest request(p, b);

  constexpr bool kRows = kPass == ScorePass::rows;
  const int origin = kRows ? static_cast<int>(request.first_row) : 0;
  const int own_end = static_cast<int>(kRows ? request.rows : request.columns);
  const int block_first = origin + static_cast<int>(block) * Shape::kBlockRows;
  if (block_first >= own_end) return;
  const int block_last = min(block_first + Shape::kBlockRows, own_end) - 1;
  const int warp_index = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
  ScoreWarp<T, kBucket, kPass, kNoise> warp(p, plan, request, b, h,
                                            block_first + warp_index * Shape::kOwnRows, own_end);

  const int stream_origin = kRows ? 0 : static_cast<int>(request.first_row);
  const int split_begin = stream_origin + split * plan.per_split;
  // Starts at a whole tile from the split's start, so that no tile reaches into the next split.
  const int before = max(warp.begin(block_first) - split_begin, 0);
  const int begin = split_begin + before / Shape::kTileRows * Shape::kTileRows;
  const int end = min(warp.end(block_last), split_begin + plan.per_split);
  const Rows& streamed = kRows ? p.k : p.q;
  const int64_t head = kRows ? h * p.kv_heads / p.heads : h;
  Loader loader({rows_at<T>(streamed, b, 0, head), streamed.seq,
                 static_cast<int>(kRows ? request.columns : request.rows),
                 static_cast<int>(p.head_dim), plan.aligned},
                begin, plan.step);
  const int whole_end = plan.whole ? end : 0;
  const auto load_stage = [&](uint32_t to, int row) {
    if (row + Shape::kTileRows <= whole_end)
      loader.template load_whole<kScoreThreads>(to);
    else
      loader.load(to, row);
    cp_async_commit();
  };
  uint32_t stage = shared_address(shared);
  const uint32_t own_chunk = Loader::own_offset();
  int other = Shape::kTileBytes;
  if (begin < end) load_stage(stage + own_chunk, begin);
#pragma unroll 1
  for (int row = begin; row < end; row += Shape::kTileRows) {
    cp_async_wait<0>();
    __syncthreads();
    if (row + Shape::kTileRows < end) load_stage(stage + other + own_chunk, row + Shape::kTileRows);
    warp.add_tile(stage, row);
    stage += other;
    other = -other;
  }
  const int64_t part = split * p.batch * p.heads + bh;
  warp.epilogue([&](int row, float top, float sum) {
    if constexpr (kRows)
      plan.parts[part * p.window_queries + row - origin] = {top, sum};
    else
      plan.sums[part * p.seqlen_k + row] = sum;
  });
}

}  // namespace tokenmill::cuda::attention_column_scores
