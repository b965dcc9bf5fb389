// Forward. A block owns a tile of queries of one block, 16 rows a warp; the keys that any of them
// sees stream through two stages of shared memory, gathered into full tiles.
#pragma once
#include "dense/attention/kernel_finish.cuh"
#include "dense/attention_decode/kernel_products.cuh"
#include "sparse/block_sparse_attention/kernel_keys.cuh"

namespace tokenmill::cuda {

// Warps own rows alone, not columns. Queries take half of what is left beside the stages, so that
// blocks fit the 99 KiB of shared memory of small chips.
template <typename T, int kBucket>
struct BlockShape : DecodeShape<T, kBucket> {
  using Base = DecodeShape<T, kBucket>;
  using Stream = StreamShape<T, kBucket>;
  static constexpr int kColumnWarps = 1, kRowOrKeyWarps = 8;
  static constexpr int kMaxRowWarps = Base::kRowBytes <= 256 ? 8 : 32768 / (16 * Base::kRowBytes);
  static constexpr int kKeysBytes = 128, kRingBytes = Stream::kRing * 4;
  static_assert(sizeof(TileKeys) + 8 <= kKeysBytes && Stream::kTileRows == Base::kTileKeys);

  // What is known of the keys and where they lie, stages, queries; in the end, sums.
  static constexpr int shared_bytes(int row_warps) {
    const int stream = 2 * Base::kStageBytes + row_warps * 16 * Base::kRowBytes;
    const int sums = Base::kFloat ? 0 : row_warps * 16 * Base::kPartialRow * 4;
    return kKeysBytes + kRingBytes + (stream > sums ? stream : sums);
  }
};

template <typename T, int kBucket>
class BlockWarp : public DecodeProducts<T, kBucket, BlockShape<T, kBucket>> {
 public:
  using Products = DecodeProducts<T, kBucket, BlockShape<T, kBucket>>;
  using typename Products::Addresses;
  using typename Products::Shape;
  static constexpr int kFlushKeys = 1024;

  __device__ BlockWarp(const BlockSparseLaunch& d, const QueryTile& q, uint32_t queries)
      : Products(threadIdx.x / kWarpSize, queries), d_(d) {
    const int first = 16 * row_warp_;
    active_ = first < q.rows;
    own_ = first + static_cast<int>(threadIdx.x % kWarpSize) / 4;
    first_position_ = q.position(first);
    last_position_ = q.position(min(first + 16, q.rows) - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) position_[half] = q.position(own_ + 8 * half);
    this->clear();
  }

  // Adds the kStepKeys keys from t on, at `at`; `places` are their positions.
  __device__ __forceinline__ void add_step(const TileKeys& keys, const int* places,
                                           const Addresses& at, int t) {
    const int lane = threadIdx.x % kWarpSize % Shape::kStepKeys;
    const int2 seen_by = keys.seen_by(t + lane, places[lane]);
    if (!__any_sync(kFullWarp, seen_by.x <= last_position_ && seen_by.y > first_position_)) return;
    const bool whole =
        __all_sync(kFullWarp, seen_by.x <= first_position_ && seen_by.y > last_position_);
    float s[kKeyTiles][4];
    this->multiply_keys(s, at);
    const float cap = d_.attention.softcap, scale = d_.attention.scale;
    if (cap > 0)
      Products::each_score(s, [&](float& x, int, int) { x = cap * tanhf(x * scale / cap); });
    const float factor = kLog2e * (cap > 0 ? 1 : scale);
    Products::each_score(s, [&](float& x, int, int) { x *= factor; });
    if (!whole)
      Products::each_score(s, [&](float& x, int half, int key) {
        const int2 by = keys.seen_by(t + key, places[key]);
        if (position_[half] < by.x || position_[half] >= by.y) x = -infinity();
      });
    this->exponentiate(s);
    this->multiply_values(s, at);
  }

  // float: moves the sums to a second level, in the output itself. With `last`, the result.
  __device__ __forceinline__ void flush(const QueryTile& q, bool last) {
    const AttentionParams& p = d_.attention;
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float level = flushed_ ? exp2_approx(neg_pivot_[half] - level_neg_pivot_[half]) : 0;
      total_[half] = (flushed_ ? total_[half] * level : 0) + quad_sum(sum_[half]);
      level_neg_pivot_[half] = neg_pivot_[half];
      sum_[half] = 0;
      const int row = own_ + 8 * half;
      const RowScale scale = finish_softmax(total_[half], -neg_pivot_[half], nullptr, 0);
      if (row < q.rows) {
        const int i = q.query(row), h = q.head_of(row);
        if (last && c == 0) p.lse[(q.b * p.heads + h) * p.seqlen_q + i] = scale.lse;
        float* to = rows_at<float>(p.out, q.b, i, h);
        // Lane c of a quad holds columns 32 group + 8 c ... + 7.
#pragma unroll
        for (int n = 0; n < Products::kTiles; ++n)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = 32 * (n / 4) + 8 * c + 4 * j + n % 4;
            if (column >= p.value_dim) continue;
            const float x = fmaf(flushed_ ? to[column] : 0, level, out_[n][2 * half + j]);
            to[column] = last ? x * scale.factor : x;
          }
      }
#pragma unroll
      for (int n = 0; n < Products::kTiles; ++n) out_[n][2 * half] = out_[n][2 * half + 1] = 0;
    }
    flushed_ = true;
  }

  // 16 bits: sums in `rows` of this warp, in shared memory, become results.
  __device__ __forceinline__ void finish(const QueryTile& q, float* rows) {
    const AttentionParams& p = d_.attention;
    const int lane = threadIdx.x % kWarpSize;
    this->store(rows);
    __syncwarp();
    const float* own = rows + lane % 16 * Shape::kPartialRow;
    const RowScale scale = finish_softmax(own[Shape::kSumAt], own[Shape::kPivotAt], nullptr, 0);
#pragma unroll 1
    for (int r = 0; r < 16 && 16 * row_warp_ + r < q.rows; ++r) {
      const float* row = rows + r * Shape::kPartialRow;
      const int in_tile = 16 * row_warp_ + r, i = q.query(in_tile), h = q.head_of(in_tile);
      const float factor = __shfl_sync(kFullWarp, scale.factor, r);
      if (lane == r) p.lse[(q.b * p.heads + h) * p.seqlen_q + i] = scale.lse;
      T* to = rows_at<T>(p.out, q.b, i, h);
#pragma unroll
      for (int column = lane; column < kBucket; column += kWarpSize)
        if (column < p.value_dim) to[column] = static_cast<T>(row[column] * factor);
    }
  }

 private:
  using Products::active_, Products::row_warp_, Products::kKeyTiles;
  using Products::neg_pivot_, Products::sum_, Products::out_;

  const BlockSparseLaunch& d_;
  int own_;                             // row g of the tile
  int first_position_, last_position_;  // of the warp's queries
  int position_[2];                     // of those of rows g and g + 8
  bool flushed_ = false;
  float total_[2], level_neg_pivot_[2];
};

template <typename T, int kBucket>
__global__ void __launch_bounds__(BlockShape<T, kBucket>::kMaxRowWarps* kWarpSize)
    block_sparse_forward_kernel(const __grid_constant__ BlockSparseLaunch d) {
  using Shape = BlockShape<T, kBucket>;
  using KeyTile = typename Shape::KeyTile;
  using Source = KeySource<T, typename Shape::Stream, KeyTile, typename Shape::ValueTile>;
  extern __shared__ __align__(128) unsigned char shared[];
  TileKeys* const keys = reinterpret_cast<TileKeys*>(shared);
  int* const places = reinterpret_cast<int*>(shared + Shape::kKeysBytes);
  unsigned char* const work = shared + Shape::kKeysBytes + Shape::kRingBytes;
  const uint32_t stages = shared_address(work), queries = stages + 2 * Shape::kStageBytes;

  const AttentionParams& p = d.attention;
  const QueryTile q = QueryTile::of(d);
  if (q.rows <= 0) return;
  TileKeys::find(d, q, keys, reinterpret_cast<int*>(shared + Shape::kKeysBytes) - 2);

  using QueryCopy = RowCopy<T, KeyTile>;
  for (int r = QueryCopy::first_row(); r < 16 * d.row_warps; r += QueryCopy::row_step()) {
    const int row = min(r, q.rows - 1);
    QueryCopy::copy(queries, r, rows_at<T>(p.q, q.b, q.query(row), q.head_of(row)),
                    r < q.rows ? static_cast<int>(p.head_dim) : 0, d.aligned);
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  BlockWarp<T, kBucket> warp(d, q, queries);
  warp.load_queries();

  const int64_t kv_head = d.kv_head(q.head);
  Source source{d,
                *keys,
                places,
                stages,
                rows_at<const T>(p.k, q.b, 0, kv_head),
                rows_at<const T>(p.v, q.b, 0, kv_head)};
  typename BlockWarp<T, kBucket>::Addresses at(stages);
  stream_rows<Shape::kTileKeys, int>(source, keys->total, [&](int stage, int first) {
    if (warp.active()) {
      int k = 0;
#pragma unroll 1
      for (; k < Shape::kTileKeys; k += Shape::kStepKeys) {
        warp.add_step(*keys, &source.at(first + k), at, first + k);
        at.move(Shape::kStepKeys * Shape::kRowBytes);
      }
      if constexpr (Shape::kFloat)
        if ((first + k) % warp.kFlushKeys == 0) warp.flush(q, false);
    }
    at.move(stage ? -Shape::kStageBytes - Shape::kTileBytes
                  : Shape::kStageBytes - Shape::kTileBytes);
  });
  if (!warp.active()) return;
  if constexpr (Shape::kFloat)
    warp.flush(q, true);
  else
    warp.finish(q,
                reinterpret_cast<float*>(work) + threadIdx.x / kWarpSize * 16 * Shape::kPartialRow);
}

}  // namespace tokenmill::cuda
