// Forward of attention to lists. A block owns a tile of queries that share a list, 16 rows a warp;
// the keys that any of them sees stream through two stages of shared memory, gathered into full
// tiles.
#pragma once
#include "dense/attention/kernel_finish.cuh"
#include "dense/attention_decode/kernel_products.cuh"
#include "sparse/listed_keys.cuh"

namespace tokenmill::cuda {

// Warps own rows; two of them share 256 columns of float32, whose accumulators leave one no room.
// Queries take half of what is left beside the stages, so that blocks fit the 99 KiB of shared
// memory of small chips.
template <typename T, int kBucket>
struct ListedShape : DecodeShape<T, kBucket> {
  using Base = DecodeShape<T, kBucket>;
  using Stream = StreamShape<T, kBucket>;
  static constexpr int kColumnWarps = Base::kRowBytes > 512 ? 2 : 1;
  static constexpr int kMaxRowWarps = Base::kRowBytes <= 256 ? 8 : 32768 / (16 * Base::kRowBytes);
  static constexpr int kRowOrKeyWarps = kMaxRowWarps;
  static constexpr int kMinRowWarps = kColumnWarps > 1 ? kRowOrKeyWarps : 1;
  static constexpr int kMaxThreads = kMaxRowWarps * kColumnWarps * kWarpSize;
  static constexpr int kKeysBytes = 128, kRingBytes = Stream::kRing * 4;
  static_assert(Stream::kTileRows == Base::kTileKeys);

  // What is known of the keys and where they lie, stages, queries; in the end, sums.
  static constexpr int shared_bytes(int row_warps) {
    const int stream = 2 * Base::kStageBytes + row_warps * 16 * Base::kRowBytes;
    const int sums = Base::kFloat ? 0 : row_warps * 16 * Base::kPartialRow * 4;
    return kKeysBytes + kRingBytes + (stream > sums ? stream : sums);
  }
};

template <typename T, int kBucket, typename Walk>
class ListedWarp : public DecodeProducts<T, kBucket, ListedShape<T, kBucket>> {
 public:
  using Products = DecodeProducts<T, kBucket, ListedShape<T, kBucket>>;
  using Launch = typename Walk::Launch;
  using Queries = typename Walk::Queries;
  using Keys = typename Walk::Keys;
  using typename Products::Addresses;
  using typename Products::Shape;
  static constexpr int kFlushKeys = 1024;

  __device__ ListedWarp(const Launch& d, const Queries& q, uint32_t queries)
      : Products(Products::row_or_key_warp(), queries), d_(d) {
    const int first = 16 * row_warp_;
    active_ = first < q.rows;
    own_ = first + static_cast<int>(threadIdx.x % kWarpSize) / 4;
    first_position_ = q.position(first);
    last_position_ = q.position(min(first + 16, q.rows) - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) position_[half] = q.position(own_ + 8 * half);
    this->clear();
  }

  // All rows see the kTileKeys keys from t on.
  __device__ __forceinline__ bool sees_all(const Keys& keys, const int* places, int t) const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < Shape::kTileKeys; i += kWarpSize) {
      const int key = (i + static_cast<int>(threadIdx.x) % kWarpSize) % Shape::kTileKeys;
      const int2 by = keys.seen_by(t + key, places[key]);
      all &= by.x <= first_position_ && by.y > last_position_;
    }
    return __all_sync(kFullWarp, all);
  }

  // Adds the kStepKeys keys from t on, at `at`; `places` are their positions. `whole`: all rows see
  // all of them; if not, that is found out.
  __device__ __forceinline__ void add_step(const Keys& keys, const int* places, const Addresses& at,
                                           int t, bool whole) {
    if (!whole) {
      const int lane = threadIdx.x % kWarpSize % Shape::kStepKeys;
      const int2 by = keys.seen_by(t + lane, places[lane]);
      if (!__any_sync(kFullWarp, by.x <= last_position_ && by.y > first_position_)) return;
      whole = __all_sync(kFullWarp, by.x <= first_position_ && by.y > last_position_);
    }
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
  __device__ __forceinline__ void flush(const Keys& keys, const Queries& q, bool last) {
    const AttentionParams& p = d_.attention;
    const int c = threadIdx.x % 4;
    const bool fours = p.value_dim % 4 == 0;  // out is contiguous
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float level = flushed_ ? exp2_approx(neg_pivot_[half] - level_neg_pivot_[half]) : 0;
      total_[half] = (flushed_ ? total_[half] * level : 0) + quad_sum(sum_[half]);
      level_neg_pivot_[half] = neg_pivot_[half];
      sum_[half] = 0;
      const int row = own_ + 8 * half;
      const RowScale scale = keys.finish(total_[half], -neg_pivot_[half]);
      if (row < q.rows) {
        const int i = q.query(row), h = q.head_of(row);
        if (last && c == 0 && Products::first_column() == 0)
          p.lse[(q.b * p.heads + h) * p.seqlen_q + i] = scale.lse;
        float* to = rows_at<float>(p.out, q.b, i, h);
        const float factor = last ? scale.factor : 1;
        // Lane c of a quad holds columns 32 group + 8 c ... + 7.
#pragma unroll
        for (int n = 0; n < Products::kTiles / 2; ++n) {
          const int column = Products::first_column() + 32 * (n / 2) + 8 * c + 4 * (n % 2);
          float x[4], y[4] = {0, 0, 0, 0};
#pragma unroll
          for (int t = 0; t < 4; ++t) x[t] = out_[4 * (n / 2) + t][2 * half + n % 2];
          if (fours && column < p.value_dim) {
            if (flushed_) load_floats(y, to + column);
#pragma unroll
            for (int t = 0; t < 4; ++t) x[t] = fmaf(y[t], level, x[t]) * factor;
            store_floats(to + column, x);
          }
          if (fours) continue;
#pragma unroll
          for (int t = 0; t < 4; ++t)
            if (column + t < p.value_dim)
              to[column + t] = (flushed_ ? fmaf(to[column + t], level, x[t]) : x[t]) * factor;
        }
      }
#pragma unroll
      for (int n = 0; n < Products::kTiles; ++n) out_[n][2 * half] = out_[n][2 * half + 1] = 0;
    }
    flushed_ = true;
  }

  // 16 bits: sums in `rows` of this warp, in shared memory, become results. Lane l knows where row
  // l % 16 goes.
  __device__ __forceinline__ void finish(const Keys& keys, const Queries& q, float* rows) {
    const AttentionParams& p = d_.attention;
    const int lane = threadIdx.x % kWarpSize, own = lane % 16;
    const int count = min(16, q.rows - 16 * row_warp_), in_tile = 16 * row_warp_ + own;
    const int i = q.query(in_tile), h = q.head_of(in_tile);
    this->store(rows);
    __syncwarp();
    const float* sums = rows + own * Shape::kPartialRow;
    const RowScale scale = keys.finish(sums[Shape::kSumAt], sums[Shape::kPivotAt]);
    if (lane < count) p.lse[(q.b * p.heads + h) * p.seqlen_q + i] = scale.lse;
    const auto row = reinterpret_cast<uint64_t>(rows_at<T>(p.out, q.b, i, h));
    const bool pairs = p.value_dim % 2 == 0;  // out is contiguous
#pragma unroll 1
    for (int r = 0; r < count; ++r) {
      const float factor = __shfl_sync(kFullWarp, scale.factor, r);
      T* to = reinterpret_cast<T*>(__shfl_sync(kFullWarp, row, r));
#pragma unroll
      for (int first = 0; first < kBucket; first += 2 * kWarpSize) {
        const int column = first + 2 * lane;
        const float2 x = *reinterpret_cast<const float2*>(rows + r * Shape::kPartialRow + column);
        const float both[2] = {x.x * factor, x.y * factor};
        if (pairs) {
          if (column < p.value_dim) store_floats(to + column, both);
        } else {
          if (column < p.value_dim) to[column] = static_cast<T>(both[0]);
          if (column + 1 < p.value_dim) to[column + 1] = static_cast<T>(both[1]);
        }
      }
    }
  }

 private:
  using Products::active_, Products::row_warp_, Products::kKeyTiles;
  using Products::neg_pivot_, Products::sum_, Products::out_;

  const Launch& d_;
  int own_;                             // row g of the tile
  int first_position_, last_position_;  // of the warp's queries
  int position_[2];                     // of those of rows g and g + 8
  bool flushed_ = false;
  float total_[2], level_neg_pivot_[2];
};

template <typename T, int kBucket, typename Walk>
__device__ __forceinline__ void listed_forward(const typename Walk::Launch& d) {
  using Shape = ListedShape<T, kBucket>;
  using Warp = ListedWarp<T, kBucket, Walk>;
  using Keys = typename Walk::Keys;
  using KeyTile = typename Shape::KeyTile;
  using Source = KeySource<T, typename Shape::Stream, Walk, KeyTile, typename Shape::ValueTile>;
  static_assert(sizeof(Keys) + 8 <= Shape::kKeysBytes);
  extern __shared__ __align__(128) unsigned char shared[];
  Keys* const keys = reinterpret_cast<Keys*>(shared);
  int* const places = reinterpret_cast<int*>(shared + Shape::kKeysBytes);
  unsigned char* const work = shared + Shape::kKeysBytes + Shape::kRingBytes;
  const uint32_t stages = shared_address(work), queries = stages + 2 * Shape::kStageBytes;

  const AttentionParams& p = d.attention;
  const auto q = Walk::Queries::of(d);
  if (q.rows <= 0) return;
  Keys::find(d, q, keys, reinterpret_cast<int*>(shared + Shape::kKeysBytes) - 2);

  using QueryCopy = RowCopy<T, KeyTile>;
  for (int r = QueryCopy::first_row(); r < 16 * d.row_warps; r += QueryCopy::row_step()) {
    const int row = min(r, q.rows - 1);
    QueryCopy::copy(queries, r, row_at<T>(d.q(), q.b, q.place(row), q.head_of(row)),
                    r < q.rows ? static_cast<int>(p.head_dim) : 0, d.aligned);
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  Warp warp(d, q, queries);
  warp.load_queries();

  const int64_t kv_head = d.kv_head(q.head);
  Source source{d,
                *keys,
                places,
                stages,
                row_at<const T>(d.k(), q.b, 0, kv_head),
                row_at<const T>(d.v(), q.b, 0, kv_head)};
  auto at = Warp::addresses(stages, 0);
  stream_rows<Shape::kTileKeys, int>(source, keys->total, [&](int stage, int first) {
    if (warp.active()) {
      const bool whole = warp.sees_all(*keys, &source.at(first), first);
      int k = 0;
#pragma unroll 1
      for (; k < Shape::kTileKeys; k += Shape::kStepKeys) {
        warp.add_step(*keys, &source.at(first + k), at, first + k, whole);
        at.move(Shape::kStepKeys * Shape::kRowBytes);
      }
      if constexpr (Shape::kFloat)
        if ((first + k) % warp.kFlushKeys == 0) warp.flush(*keys, q, false);
    }
    at.move(stage ? -Shape::kStageBytes - Shape::kTileBytes
                  : Shape::kStageBytes - Shape::kTileBytes);
  });
  if (!warp.active()) return;
  if constexpr (Shape::kFloat)
    warp.flush(*keys, q, true);
  else
    warp.finish(*keys, q,
                reinterpret_cast<float*>(work) + threadIdx.x / kWarpSize * 16 * Shape::kPartialRow);
}

}  // namespace tokenmill::cuda
