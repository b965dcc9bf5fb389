// Forward of attention over lists. A CTA owns a tile of queries that share a list; the keys that
// any of them sees are gathered into full tiles and stream through two stages of shared memory.
#pragma once
#include "attention/epilogue.cuh"
#include "attention/score_mod.cuh"
#include "sparse/listed_keys.cuh"
#include "sparse/listed_products.cuh"

namespace tokenmill::cuda {

// Keys: Walk::Keys.
template <typename T, int kBucket, typename Keys>
struct ForwardMemory {
  using Shape = ListedShape<T, kBucket>;
  using Stream = StreamShape<T, kBucket>;
  using Table = KeyTable<T, Keys, Stream::kTileRows>;
  static_assert(Stream::kTileRows == Shape::kTileKeys);

  // Destination and final statistics of a 16-bit row.
  struct RowEnd {
    float sum, row_max;
    T* to;
  };
  static constexpr int kRows = Shape::kMaxRowWarps * Shape::kWarpRows;
  // Layout: key table, query positions, then stages, which hold the results at the end; Q if rows
  // are wide.
  static constexpr int kPositionsAt = sizeof(Table), kStagesAt = kPositionsAt + kRows * 4;
  static_assert(kStagesAt % 128 == 0);
  static constexpr int kEndsAt = kStagesAt + kRows * Shape::kRowBytes;
  static_assert(kEndsAt + kRows * sizeof(RowEnd) <= kStagesAt + 2 * Shape::kStageBytes);
  static constexpr int bytes(int row_warps) {
    const int queries = Shape::kWide ? row_warps * 16 * Shape::kRowBytes : 0;
    return kStagesAt + 2 * Shape::kStageBytes + queries;
  }
};

template <typename T, int kBucket, typename Walk>
class ListedWarp : public ListedProducts<T, kBucket> {
 public:
  using Products = ListedProducts<T, kBucket>;
  using Launch = typename Walk::Launch;
  using Queries = typename Walk::Queries;
  using Memory = ForwardMemory<T, kBucket, typename Walk::Keys>;
  using Table = typename Memory::Table;
  using RowEnd = typename Memory::RowEnd;
  using typename Products::Addresses;
  using typename Products::Shape;
  static constexpr int kFlushKeys = 1024;
  // Registers are short: values used once per tile, or at the end, are recomputed.
  static constexpr bool kForgets = kBucket > 64 && !Shape::kFloat;

  // Rows past the end of the tile repeat the last one. Positions are kept in shared memory, because
  // only masked tiles need them and registers are short.
  __device__ ListedWarp(const Launch& d, const Queries& q, uint32_t queries, int* positions)
      : d_(d) {
    if (q.rows <= first()) return;
    const int own = threadIdx.x % kWarpSize, i = row(q, own);
    if (own < Shape::kWarpRows && Products::first_column() == 0)
      positions[first() + own] = q.position(i);
    if constexpr (Shape::kQueryInRegisters) {
      Products::load_queries(row_at<const T>(d.q(), q.b, q.place(i), q.head_of(i)),
                             static_cast<int>(d.attention.head_dim), d.aligned);
    } else {
      Products::find_queries(queries);
    }
  }

  // Number of rows from this warp's first one on.
  static __device__ __forceinline__ int rows(const Table& table) { return table.rows - first(); }

  // Processes the tile that starts with key t, at address `at`, which is unchanged on return.
  __device__ __forceinline__ void add_tile(const Table& table, const int* positions, Addresses& at,
                                           int t) {
    const int* const own = positions + first();
    if (d_.attention.softcap <= 0 && rows(table) > Shape::kWarpRows - 16 &&
        table.ring.seen_by_all(t, own[edge()]))
      add_whole(at);
    else
      add_rows(table, own, at, t);
  }

  // float32: moves the partial sums to a second level of accumulation, in the output itself. `last`
  // writes the final result.
  __device__ __forceinline__ void flush(const Table& table, const Queries& q, bool last) {
    const AttentionParams& p = d_.attention;
    const int c = threadIdx.x % 4, g = threadIdx.x % kWarpSize / 4;
    const bool fours = d_.aligned_out;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const int m = r / 2, half = r % 2;
      const float neg_row_max = neg_row_max_[m][half];
      const float level = flushed_ ? exp2_approx(neg_row_max - level_neg_row_max_[r]) : 0;
      total_[r] = (flushed_ ? total_[r] * level : 0) + quad_sum(sum_[m][half]);
      level_neg_row_max_[r] = neg_row_max;
      sum_[m][half] = 0;
      if (8 * r + g < rows(table)) {
        const int own = first() + 8 * r + g, i = q.query(own), h = q.head_of(own);
        const RowScale scale = table.keys.epilogue(d_, h, total_[r], -neg_row_max);
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
          for (int t = 0; t < 4; ++t) x[t] = out_[m][4 * (n / 2) + t][2 * half + n % 2];
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
      for (int n = 0; n < Products::kTiles; ++n)
        out_[m][n][2 * half] = out_[m][n][2 * half + 1] = 0;
    }
    flushed_ = true;
  }

  // 16 bits: epilogue through shared memory, since a lane holds 4 bytes of a 16-byte chunk. `area`
  // has room for the rows of this warp, `ends` for their destinations. Lane l knows the destination
  // of row l % kWarpRows.
  __device__ __forceinline__ void store(const Table& table, const Queries& q, uint32_t area,
                                        RowEnd* ends) {
    const AttentionParams& p = d_.attention;
    const int lane = threadIdx.x % kWarpSize, own = lane % Shape::kWarpRows;
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r) {
      const float sum = quad_sum(sum_[r / 2][r % 2]);
      if (lane % 4 == 0) {
        ends[8 * r + lane / 4].sum = sum;
        ends[8 * r + lane / 4].row_max = -neg_row_max_[r / 2][r % 2];
      }
    }
    __syncwarp();
    const int i = q.query(row(q, own)), h = q.head_of(row(q, own));
    const RowScale scale = table.keys.epilogue(d_, h, ends[own].sum, ends[own].row_max);
    if (lane < Shape::kWarpRows) {
      if (lane < rows(table)) p.lse[(q.b * p.heads + h) * p.seqlen_q + i] = scale.lse;
      ends[lane].to = rows_at<T>(p.out, q.b, i, h);
    }
    float factors[2 * kRowTiles];  // for rows g, g + 8, ...
#pragma unroll
    for (int r = 0; r < 2 * kRowTiles; ++r)
      factors[r] = __shfl_sync(kFullWarp, scale.factor, 8 * r + lane / 4);
    if (d_.aligned_out)
      store_chunks(area, ends, rows(table), factors);
    else
      store_elements(ends, rows(table), factors);
  }

 private:
  using Products::kRowTiles;
  using Products::neg_row_max_, Products::sum_, Products::out_;

  // First row of this warp within the CTA.
  static __device__ int first() { return Shape::kWarpRows * Products::row_warp(); }
  // First row for the lower half of the lanes, last row for the upper half.
  static __device__ int edge() {
    return threadIdx.x % kWarpSize < kWarpSize / 2 ? 0 : Shape::kWarpRows - 1;
  }
  static __device__ int row(const Queries& q, int r) { return min(first() + r, q.rows - 1); }

  // Processes a tile in which all rows see all keys.
  __device__ __forceinline__ void add_whole(Addresses& at) {
    if constexpr (Shape::kFloat) {
#pragma unroll 1
      for (int k = 0; k < Shape::kTileKeys; k += Shape::kStepKeys) {
        Products::template add_step<0, kRowTiles, Shape::kStepKeys, 0>(
            at, d_.factor, 1, [](auto&) { return false; }, nullptr);
        at.move(Shape::kStepKeys * Shape::kRowBytes);
      }
      at.move(-Shape::kTileBytes);
    } else {
      unroll<Shape::kTileKeys / Shape::kStepKeys>([&](auto i) {
        if constexpr (kBucket > 64 && i > 0) end_block<i * Shape::kStepKeys>(d_.row_warps);
        Products::template add_step<0, kRowTiles, Shape::kStepKeys, i * Shape::kStepKeys>(
            at, d_.factor, d_.row_warps, [](auto&) { return false; }, nullptr);
      });
    }
  }

  // Processes a masked tile, one row tile at a time.
  __device__ __forceinline__ void add_rows(const Table& table, const int* positions, Addresses& at,
                                           int t) {
    constexpr int kKeys = Shape::kMaskedKeys;
    int lane = threadIdx.x % kWarpSize;
    opt_barrier(lane);
#pragma unroll 1
    for (const int end = t + Shape::kTileKeys; t < end; t += kKeys) {
      const Seeing own = table.ring.seen_by(t + lane % kKeys);
      unroll<kRowTiles>([&](auto m) {
        const int* const position = positions + 16 * m;
        const int first = position[0], last = position[15];
        if (16 * m >= rows(table) || !__any_sync(kFullWarp, own.by_any(first, last))) return;
        const bool all = __all_sync(kFullWarp, own.by_all(first, last));
        Products::template add_step<m, 1, kKeys, 0>(
            at, 1.f, d_.row_warps,
            [&](float (&s)[1][kKeys / 8][4]) {
              apply_score_mod(s[0]);
              if (!all) hide(s[0], &table.ring.seen_by(t + lane % 4 * 2), position + lane / 4);
              return !all;
            },
            [&](int half, int key) {
              return table.ring.seen_by(t + key).by(position[lane / 4 + 8 * half]);
            });
      });
      at.move(kKeys * Shape::kRowBytes);
    }
    at.move(-Shape::kTileBytes);
  }

  template <int kKeyTiles>
  __device__ __forceinline__ void apply_score_mod(float (&s)[kKeyTiles][4]) const {
    const float cap = d_.attention.softcap, scale = d_.attention.scale;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][i] = cap > 0 ? apply_softcap(s[n][i] * scale, cap, kLog2e) : s[n][i] * d_.factor;
  }

  // `seen`: of this lane's first key; `positions`: of its first row.
  template <int kKeyTiles>
  static __device__ __forceinline__ void hide(float (&s)[kKeyTiles][4], const Seeing* seen,
                                              const int* positions) {
    const int position[2] = {positions[0], positions[8]};
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const int4 both = *reinterpret_cast<const int4*>(seen + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Seeing by = i % 2 ? Seeing{both.z, both.w} : Seeing{both.x, both.y};
        if (!by.by(position[i / 2])) s[n][i] = -infinity();
      }
    }
  }

  __device__ __forceinline__ void store_elements(const RowEnd* ends, int rows,
                                                 const float (&factors)[2 * kRowTiles]) const {
    const int lane = threadIdx.x % kWarpSize;
    __syncwarp();
    unroll<2 * kRowTiles>([&](auto r) {
      if (8 * r + lane / 4 >= rows) return;
      T* const to = ends[8 * r + lane / 4].to;
      unroll<2 * Products::kTiles>([&](auto i) {
        const int column = 8 * (i / 2) + lane % 4 * 2 + i % 2;
        if (column < d_.attention.value_dim)
          to[column] = static_cast<T>(out_[r / 2][i / 2][r % 2 * 2 + i % 2] * factors[r]);
      });
    });
  }

  __device__ __forceinline__ void store_chunks(uint32_t area, const RowEnd* ends, int rows,
                                               const float (&factors)[2 * kRowTiles]) const {
    using Tile = typename Shape::KeyTile;
    constexpr int kPatterns = Tile::kSwizzledChunks;
    constexpr int kLanes = Tile::kChunks;  // lanes per row
    constexpr int kRows = kWarpSize / kLanes;
    constexpr int kCount = kChunkBytes / static_cast<int>(sizeof(T));
    static_assert(kLanes <= kWarpSize);
    const int lane = threadIdx.x % kWarpSize, chunk = lane % kLanes;
    uint32_t to[kPatterns];
#pragma unroll
    for (int n = 0; n < kPatterns; ++n) to[n] = area + lane % 4 * 4 + Tile::offset(lane / 4, n);
    unroll<2 * kRowTiles>([&](auto r) {
      unroll<Products::kTiles>([&](auto n) {
        const float* sums = out_[r / 2][n] + r % 2 * 2;
        store_shared<r * 8 * Shape::kRowBytes + n / kPatterns * kPatterns * kChunkBytes>(
            to[n % kPatterns], pack<T>(sums[0] * factors[r], sums[1] * factors[r]));
      });
    });
    __syncwarp();
    if (chunk * kCount >= d_.attention.value_dim) return;
    const uint32_t from = area + Tile::offset(lane / kLanes, chunk);
    unroll<Shape::kWarpRows / kRows>([&](auto i) {
      const int r = i * kRows + lane / kLanes;
      if (r >= rows) return;
      uint32_t words[4];
      load_shared<i * kRows * Shape::kRowBytes>(words,
                                                from ^ Tile::swizzle(i * kRows % 8) * kChunkBytes);
      store_global(ends[r].to + chunk * kCount, words);
    });
  }

  const Launch& d_;
  bool flushed_ = false;
  float total_[2 * kRowTiles], level_neg_row_max_[2 * kRowTiles];
};

template <typename T, int kBucket, typename Walk>
__device__ __forceinline__ void listed_forward(const typename Walk::Launch& d) {
  using Shape = ListedShape<T, kBucket>;
  using Warp = ListedWarp<T, kBucket, Walk>;
  using Memory = typename Warp::Memory;
  using KeyTile = typename Shape::KeyTile;
  using Source = KeySource<T, StreamShape<T, kBucket>, Walk, KeyTile, typename Shape::ValueTile>;
  extern __shared__ __align__(128) unsigned char shared[];
  auto& table = *reinterpret_cast<typename Memory::Table*>(shared);
  int* const positions = reinterpret_cast<int*>(shared + Memory::kPositionsAt);
  const uint32_t stages = shared_address(shared + Memory::kStagesAt);
  const uint32_t queries = stages + 2 * Shape::kStageBytes;

  const AttentionParams& p = d.attention;
  const auto q = Walk::Queries::of(d);
  if (q.rows <= 0) return;
  if constexpr (Shape::kWide) {
    using QueryCopy = RowCopy<T, KeyTile>;
    for (int r = QueryCopy::first_row(); r < 16 * d.row_warps; r += QueryCopy::row_step()) {
      const int row = min(r, q.rows - 1);
      QueryCopy::copy_to(queries, r, row_at<T>(d.q(), q.b, q.place(row), q.head_of(row)),
                         r < q.rows ? static_cast<int>(p.head_dim) : 0, d.aligned);
    }
    cp_async_commit();
  }
  Warp warp(d, q, queries, positions);
  find_keys<Walk>(d, q, table);

  Source source{d, table, stages};
  auto at = Warp::addresses(stages);
  stream_rows<Shape::kTileKeys>(source, [&](int stage, int t) {
    if (warp.rows(table) > 0) {
      if constexpr (Warp::kForgets) at = Warp::addresses(stages + stage * Shape::kStageBytes);
      warp.add_tile(table, positions, at, t);
      if constexpr (Shape::kFloat)
        if ((t + Shape::kTileKeys) % warp.kFlushKeys == 0) warp.flush(table, q, false);
    }
    if constexpr (!Warp::kForgets) at.move(stage ? -Shape::kStageBytes : Shape::kStageBytes);
  });
  if (warp.rows(table) <= 0) return;
  const auto end = Warp::kForgets ? Walk::Keys::queries_again(d, table.keys) : q;
  if constexpr (Shape::kFloat) {
    warp.flush(table, end, true);
  } else {
    const int first = Warp::row_warp() * Shape::kWarpRows;
    warp.store(table, end, stages + first * Shape::kRowBytes,
               reinterpret_cast<typename Memory::RowEnd*>(shared + Memory::kEndsAt) + first);
  }
}

}  // namespace tokenmill::cuda
