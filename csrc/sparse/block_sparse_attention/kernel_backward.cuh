// Backward, seven products in two launches without atomics: one kernel owns the queries, one the
// keys, which find their queries through the transposed lists.
//
//   queries:  S = Q K^T, dP = dO V^T, dQ += dS K
//   keys:     S = K Q^T, dP = V dO^T, dV += P dO, dK += dS Q
//   dS = P (dP - delta), delta = rowsum(dO O) - dlse
#pragma once
#include "sparse/block_sparse_attention/kernel_gradient.cuh"
#include "sparse/block_sparse_attention/kernel_queries.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket>
struct QuerySideShape : GradientShape<T, kBucket, Side::queries> {
  using Base = GradientShape<T, kBucket, Side::queries>;
  static constexpr int kKeysBytes = 128, kRingBytes = Base::kRing * 4;
  static_assert(sizeof(TileKeys) + 8 <= kKeysBytes);

  static constexpr int shared_bytes(int row_warps) {
    return kKeysBytes + kRingBytes + 2 * Base::kStageBytes + 2 * row_warps * 16 * Base::kRowBytes;
  }
};

// The `rows` rows that a block owns to shared memory, zeros behind `count` of them.
template <typename Tile, typename T, typename RowOf>
__device__ __forceinline__ void load_owned(uint32_t to, int rows, int count, int64_t columns,
                                           bool aligned, const RowOf& row_of) {
  using Copy = RowCopy<T, Tile>;
  for (int r = Copy::first_row(); r < rows; r += Copy::row_step())
    Copy::copy(to, r, row_of(min(r, count - 1)), r < count ? static_cast<int>(columns) : 0,
               aligned);
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(QuerySideShape<T, kBucket>::kMaxThreads, 1)
    block_sparse_queries_kernel(const __grid_constant__ BlockSparseGradients d) {
  using Shape = QuerySideShape<T, kBucket>;
  using Tile = typename Shape::Tile;
  using Source = KeySource<T, Shape, Tile, Tile>;
  extern __shared__ __align__(128) unsigned char shared[];
  TileKeys* const keys = reinterpret_cast<TileKeys*>(shared);
  int* const places = reinterpret_cast<int*>(shared + Shape::kKeysBytes);
  const uint32_t stages = shared_address(shared + Shape::kKeysBytes + Shape::kRingBytes);
  const uint32_t owned = stages + 2 * Shape::kStageBytes;

  const AttentionParams& p = d.attention;
  const QueryTile q = QueryTile::of(d);
  if (q.rows <= 0) return;
  TileKeys::find(d, q, keys, places - 2);
  const int tile_rows = 16 * d.row_warps;
  const auto row_of = [&](const Rows& rows) {
    return [&](int r) { return rows_at<const T>(rows, q.b, q.query(r), q.head_of(r)); };
  };
  load_owned<Tile, T>(owned, tile_rows, q.rows, p.head_dim, d.aligned, row_of(p.q));
  load_owned<Tile, T>(owned + tile_rows * Shape::kRowBytes, tile_rows, q.rows, p.value_dim,
                      d.aligned, row_of(d.dout));
  commit_copies();

  GradientWarp<T, kBucket, Side::queries> warp(p, d.row_warps, owned);
  const int first = 16 * warp.row_warp(), lane = threadIdx.x % kWarpSize;
  const bool active = first < q.rows;
  const int first_position = q.position(first);
  const int last_position = q.position(min(first + 16, q.rows) - 1);
  int position[2];
  float statistics[2][2];  // minus lse, minus delta
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    position[half] = q.position(row);
    statistics[0][half] = -infinity();
    statistics[1][half] = 0;
    if (row >= q.rows) continue;
    const int64_t at = (q.b * p.heads + q.head_of(row)) * p.seqlen_q + q.query(row);
    statistics[0][half] = d.minus_lse[at];
    statistics[1][half] = d.minus_delta[at];
  }

  const int64_t kv_head = d.kv_head(q.head);
  Source source{d,
                *keys,
                places,
                stages,
                rows_at<const T>(p.k, q.b, 0, kv_head),
                rows_at<const T>(p.v, q.b, 0, kv_head)};
  stream_rows<Shape::kTileRows, int>(source, keys->total, [&](int stage, int tile) {
    if (!active) return;
#pragma unroll 1
    for (int k = 0; k < Shape::kTileRows; k += Shape::kStep) {
      const int* at = &source.at(tile + k);
      const int2 by = keys->seen_by(tile + k + lane % Shape::kStep, at[lane % Shape::kStep]);
      if (!__any_sync(kFullWarp, by.x <= last_position && by.y > first_position)) continue;
      const bool whole = __all_sync(kFullWarp, by.x <= first_position && by.y > last_position);
      warp.add_step(
          stages + stage * Shape::kStageBytes, k, whole,
          [&](int kind, int, int i) { return statistics[kind][i / 2]; },
          [&](int n, int i) {
            const int key = 8 * n + lane % 4 * 2 + i % 2;
            const int2 seen_by = keys->seen_by(tile + k + key, at[key]);
            return position[i / 2] >= seen_by.x && position[i / 2] < seen_by.y;
          });
    }
  });
  if (!active) return;
  warp.template store<true>(p.scale, q.rows - first, static_cast<int>(p.head_dim), [&](int r) {
    return rows_at<T>(d.dq, q.b, q.query(first + r), q.head_of(first + r));
  });
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(KeySideShape<T, kBucket>::kMaxThreads, 1)
    block_sparse_keys_kernel(const __grid_constant__ BlockSparseGradients d) {
  using Shape = KeySideShape<T, kBucket>;
  using Tile = typename Shape::Tile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared + Shape::kInfoBytes);
  const uint32_t owned = stages + 2 * Shape::kStageBytes;
  auto& window = *reinterpret_cast<typename Shape::Window*>(shared);

  const AttentionParams& p = d.attention;
  const int tile_rows = 16 * d.row_warps;
  const int tile = blockIdx.x % d.tiles, kv_head = blockIdx.x / d.tiles % p.kv_heads;
  const int b = static_cast<int>(blockIdx.x / d.tiles / p.kv_heads);
  const int first_key = tile * tile_rows;
  const int rows = min(tile_rows, static_cast<int>(p.seqlen_k) - first_key);
  const int seen = min(rows, static_cast<int>(d.length(b)) - first_key);  // that there are
  const auto row_of = [&](const Rows& of) {
    return [&](int r) { return rows_at<const T>(of, b, first_key + max(r, 0), kv_head); };
  };
  load_owned<Tile, T>(owned, tile_rows, seen, p.head_dim, d.aligned, row_of(p.k));
  load_owned<Tile, T>(owned + tile_rows * Shape::kRowBytes, tile_rows, seen, p.value_dim, d.aligned,
                      row_of(p.v));
  commit_copies();

  GradientWarp<T, kBucket, Side::keys> warp(p, d.row_warps, owned);
  const WarpKeys keys(d, first_key, first_key + 16 * warp.row_warp(), first_key + seen);
  const int lane = threadIdx.x % kWarpSize;
  if (seen > 0) {
    TileQueries<T, Shape> queries(d, window, stages, b, kv_head, first_key, seen);
    queries.each_window([&] {
      stream_rows<Shape::kTileRows, ListingQuery>(
          queries, queries.total(), [&](int stage, int first) {
#pragma unroll 1
            for (int k = 0; k < Shape::kTileRows; k += Shape::kStep) {
              const auto column = [&](int i) { return queries.column(first + k + i, keys); };
              const WarpKeys::Column own = column(lane % Shape::kStep);
              if (!__any_sync(kFullWarp, keys.any_seen(own))) continue;
              const bool whole = __all_sync(kFullWarp, keys.all_seen(own));
              const uint32_t at = stages + stage * Shape::kStageBytes + 2 * Shape::kTileBytes +
                                  (k + lane % 4 * 2) * 4;
              float2 statistics[2][Shape::kStep / 8];  // minus lse, minus delta
              unroll<Shape::kStep / 8>([&](auto n) {
                statistics[0][n] = load_float2<32 * n>(at);
                statistics[1][n] = load_float2<32 * n + Shape::kTileRows * 4>(at);
              });
              warp.add_step(
                  stages + stage * Shape::kStageBytes, k, whole,
                  [&](int kind, int n, int i) {
                    const float2 both = statistics[kind][n];
                    return i % 2 ? both.y : both.x;
                  },
                  [&](int n, int i) {
                    return keys.sees(column(8 * n + lane % 4 * 2 + i % 2), lane / 4 + i / 2 * 8);
                  });
            }
          });
    });
  }
  const int first = 16 * warp.row_warp();
  const auto to = [&](const Rows& of) {
    return [&](int r) { return rows_at<T>(of, b, first_key + first + r, kv_head); };
  };
  wait_for_copies<0>();
  warp.template store<true>(p.scale, rows - first, static_cast<int>(p.head_dim), to(d.dk));
  warp.template store<false>(1, rows - first, static_cast<int>(p.value_dim), to(d.dv));
}

}  // namespace tokenmill::cuda
