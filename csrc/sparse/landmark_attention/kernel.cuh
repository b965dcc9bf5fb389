// Forward. A CTA owns 64 queries of one head, 16 per warp; key tiles stream through shared memory.
// A warp holds all scores of a tile at once, and thus whole blocks.
#pragma once
#include "attention/epilogue.cuh"
#include "attention/gmem_to_smem.cuh"
#include "attention/online_softmax.cuh"
#include "attention/qk.cuh"
#include "attention/stage_addresses.cuh"
#include "attention/tile_shape.cuh"
#include "cuda/sequences.cuh"
#include "sparse/landmark_attention/kernel_blocks.cuh"
#include "sparse/landmark_attention/params.h"

namespace tokenmill::cuda::landmark_attention {

template <typename T, int kBucket>
struct LandmarkShape : TileShape<T, kBucket> {
  using Base = TileShape<T, kBucket>;
  static constexpr int kWarps = 4, kRows = 16 * kWarps;
  static constexpr int kQueryBytes = kRows * Base::kRowBytes;
  static constexpr int kSharedBytes = kQueryBytes + Base::kStageBytes;
};

struct LandmarkLaunch {
  LandmarkParams d;
  KeyTiles keys;
  int tiles;     // query tiles per head
  bool aligned;  // rows are whole 16-byte chunks
};

// Loads `rows` rows from row `first` on; rows past them, and those for which hides(row), are
// zero-filled.
template <typename Tile, typename T, typename Hides>
__device__ __forceinline__ void load_rows(uint32_t to, int maximum, const Rows& from, int64_t b,
                                          int64_t h, int first, int rows, int64_t columns,
                                          bool aligned, const Hides& hides) {
  using Copy = RowCopy<T, Tile>;
#pragma unroll 1
  for (int r = Copy::first_row(); r < maximum; r += Copy::row_step()) {
    const bool there = r < rows && !hides(first + r);
    Copy::copy_to(to, r, rows_at<const T>(from, b, there ? first + r : 0, h),
                  there ? static_cast<int>(columns) : 0, aligned);
  }
}

template <typename T, int kBucket>
class ForwardWarp {
 public:
  using Shape = LandmarkShape<T, kBucket>;
  static constexpr int kKeys = Shape::kTileKeys, kKeyTiles = kKeys / 8;

  // first: index of this warp's first query.
  __device__ ForwardWarp(const LandmarkLaunch& launch, int first, uint32_t queries, uint32_t stage)
      : keys_(launch.keys), first_(first), factor_(launch.d.attention.scale * kLog2e), at_(stage) {
    const int lane = threadIdx.x % kWarpSize;
    query_.find(queries, lane);
    statistics_.clear();
    position_[0] = first + lane / 4;
    position_[1] = position_[0] + 8;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      out_[0][n][0] = out_[0][n][1] = out_[0][n][2] = out_[0][n][3] = 0;
    // With these values the first weights of a row overflow, which triggers the update of row_max.
    neg_row_max_[0][0] = neg_row_max_[0][1] = kFloatMax;
    sum_[0][0] = sum_[0][1] = 0;
  }

  // Accumulates the block statistics over one tile of a block that is longer than a tile.
  __device__ __forceinline__ void search(int tile) {
    if (tile % keys_.parts == 0) statistics_.clear();
    float s[1][kKeyTiles][4];
    multiply(s);
    const int first = keys_.first(tile);
    statistics_.add(BlockColumns::of(keys_, first, keys_.count_of(tile), 0), s[0], nullptr);
  }

  __device__ __forceinline__ void add(int tile) {
    const int first = keys_.first(tile), count = keys_.count_of(tile);
    float s[1][kKeyTiles][4];
    // S = Q K^T
    multiply(s);
    const bool cut = find_exponents(s[0], first, count);
    const bool clean = cut && !all_finite<T, kKeys, kTiles>(at_);
    unroll<kKeys / kStepKeys>([&](auto step) {
      float part[1][kStepKeys / 8][4];
#pragma unroll
      for (int n = 0; n < kStepKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) part[0][n][i] = s[0][kStepKeys / 8 * step + n][i];
      Fragment<T, 4> p[1][kStepKeys / kMmaDepth<T>];
      // online softmax: P = 2^(t - row_max), rescale O where row_max grows
      softmax_weights<0, true>(part, 1.f, neg_row_max_, sum_, out_, p);
      const auto before = [](auto) {};
      // O += P V; non-finite V is added below, for visible pairs only
      if (clean)
        multiply_values<T, 0, kStepKeys * step, true>(out_, p, at_, before);
      else
        multiply_values<T, 0, kStepKeys * step>(out_, p, at_, before);
    });
    if (!clean) return;
#pragma unroll 1
    for (int k = 0; k < kKeys; k += 16)
      add_infinite<T, typename Shape::ValueTile, 16>(
          out_[0], at_.values() + k * Shape::kRowBytes,
          [&](int half, int key) { return sees(first, count, k + key, position_[half]); }, false);
  }

  template <typename RowOf>
  __device__ __forceinline__ void store(const AttentionParams& p, float* lse, const RowOf& row_of) {
    const int lane = threadIdx.x % kWarpSize, c = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const RowScale scale =
          softmax_epilogue(quad_sum(sum_[0][h]), -neg_row_max_[0][h], nullptr, 0);
      if (position_[h] >= keys_.tokens) continue;
      if (c == 0) lse[position_[h]] = scale.lse;
      T* to = row_of(position_[h]);
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // float32: lane c of a quad holds columns 32 group + 8 c ... + 7.
          const int column =
              Shape::kFloat ? 32 * (n / 4) + 8 * c + 4 * i + n % 4 : 8 * n + 2 * c + i;
          if (column < p.value_dim)
            to[column] = static_cast<T>(out_[0][n][2 * h + i] * scale.factor);
        }
    }
  }

 private:
  static constexpr int kTiles = kBucket / 8;
  // Weights of more keys at once leave no registers for float32, where each weight is held in two
  // parts.
  static constexpr int kStepKeys = Shape::kFloat ? 8 : kKeys;

  __device__ __forceinline__ void multiply(float (&s)[1][kKeyTiles][4]) const {
    multiply_shared<T, 0>(s, at_, query_);
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[0][n][i] *= factor_;
  }

  // Converts scores to exponents of weights, -inf where masked. Returns true if any key other than
  // a landmark is masked; the values of landmarks are 0.
  __device__ __forceinline__ bool find_exponents(float (&s)[kKeyTiles][4], int first, int count) {
    const int blocks = BlockColumns::blocks(keys_, count);
#pragma unroll 1
    for (int b = 0; b < blocks; ++b) {
      const BlockColumns block = BlockColumns::of(keys_, first, count, b);
      const bool earlier[2] = {position_[0] >= block.end, position_[1] >= block.end};
      float shift[2] = {0, 0};
      if (__any_sync(kFullWarp, earlier[0] || earlier[1])) {
        if (keys_.whole()) {
          statistics_.clear();
          statistics_.add(block, s, nullptr);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
          if (earlier[h]) shift[h] = statistics_.shift(h);
      }
      visit_block<kKeyTiles>(block, [&](int n, int i, int column) {
        const int h = i / 2;
        if (block.has(column))
          s[n][i] = earlier[h] || first + column <= position_[h] ? s[n][i] + shift[h] : -infinity();
        if (column == block.landmark) s[n][i] = -infinity();
      });
    }
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2 >= count) s[n][i] = -infinity();
    return first + count > first_;
  }

  __device__ bool sees(int first, int count, int column, int query) const {
    const int key = first + column;
    return column < count && !keys_.is_landmark(key) && key <= query;
  }

  KeyTiles keys_;
  int first_, position_[2];
  float factor_;
  StageAddresses<Shape, false> at_;
  SharedQueries<Shape> query_;
  BlockStatistics statistics_;
  float out_[1][kTiles][4];
  float neg_row_max_[1][2], sum_[1][2];  // for rows g, g + 8; sums of this lane
};

template <typename T, int kBucket>
__global__ void __launch_bounds__(LandmarkShape<T, kBucket>::kWarps* kWarpSize, 1)
    landmark_forward_kernel(const __grid_constant__ LandmarkLaunch launch) {
  using Shape = LandmarkShape<T, kBucket>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t queries = shared_address(shared), stage = queries + Shape::kQueryBytes;
  const AttentionParams& p = launch.d.attention;
  const KeyTiles keys = launch.keys;
  const int64_t bh = blockIdx.x / launch.tiles, b = bh / p.heads, h = bh % p.heads;
  const int64_t kv_head = h / (p.heads / p.kv_heads);
  // The last queries see the most keys: start with the longest CTAs.
  const int tile = launch.tiles - 1 - static_cast<int>(blockIdx.x % launch.tiles);
  const int first = tile * Shape::kRows, last = min(first + Shape::kRows, keys.tokens) - 1;
  const auto none = [](int) { return false; };
  load_rows<typename Shape::KeyTile, T>(queries, Shape::kRows, p.q, b, h, first, last + 1 - first,
                                        p.head_dim, launch.aligned, none);
  const int warp = threadIdx.x / kWarpSize, own = first + 16 * warp;
  ForwardWarp<T, kBucket> sums(launch, own, queries + 16 * warp * Shape::kRowBytes, stage);
  const int steps = keys.steps(last);
#pragma unroll 1
  for (int n = 0; n < steps; ++n) {
    const KeyTiles::Step step = keys.step(n, last);
    const int at = keys.first(step.tile), count = keys.count_of(step.tile);
    __syncthreads();  // the previous tile has been read
    load_rows<typename Shape::KeyTile, T>(stage, Shape::kTileKeys, p.k, b, kv_head, at, count,
                                          p.head_dim, launch.aligned, none);
    if (!step.search)
      load_rows<typename Shape::ValueTile, T>(stage + Shape::kTileBytes, Shape::kTileKeys, p.v, b,
                                              kv_head, at, count, p.value_dim, launch.aligned,
                                              [&](int key) { return keys.is_landmark(key); });
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (own > last || own + 15 < at) continue;
    if (step.search)
      sums.search(step.tile);
    else
      sums.add(step.tile);
  }
  if (own > last) return;
  sums.store(p, p.lse + bh * p.seqlen_q, [&](int i) { return rows_at<T>(p.out, b, i, h); });
}

}  // namespace tokenmill::cuda::landmark_attention
