// Backward of attention to lists, seven products in two launches without atomics: one kernel owns
// the queries, one the keys, which find their queries through the transposed lists.
//
//   queries:  S = Q K^T, dP = dO V^T, dQ += dS K
//   keys:     S = K Q^T, dP = V dO^T, dV += P dO, dK += dS Q
//   dS = P (dP - delta), delta = rowsum(dO O) - dlse
#pragma once
#include "sparse/listed_gradient.cuh"

namespace tokenmill::cuda {

template <typename T, int kBucket>
struct QuerySideShape : GradientShape<T, kBucket, Side::queries> {
  using Base = GradientShape<T, kBucket, Side::queries>;
  template <typename Keys>
  using Table = KeyTable<T, Keys, Base::kTileRows>;

  template <typename Keys>
  static constexpr int shared_bytes(int row_warps) {
    return static_cast<int>(sizeof(Table<Keys>)) + 2 * Base::kStageBytes +
           2 * row_warps * 16 * Base::kRowBytes;
  }
};

template <typename T, int kBucket, typename Listing_>
struct KeySideShape : GradientShape<T, kBucket, Side::keys> {
  using Base = GradientShape<T, kBucket, Side::keys>;
  using Listing = Listing_;

  // What is known of the queries, at the front of shared memory.
  struct alignas(128) Info {
    typename Listing::Window window;
    FetchedIds<Base::kTileRows> fetched;
    typename Listing::Place places[4 * Base::kTileRows];
  };
  static constexpr int kInfoBytes = sizeof(Info);

  static constexpr int shared_bytes(int row_warps) {
    return kInfoBytes + 2 * Base::kStageBytes + 2 * row_warps * 16 * Base::kRowBytes;
  }
};

// Rows of queries and of dO that a listing finds for a tile of keys, as stream_rows wants them.
template <typename T, typename Shape>
class TileQueries : public Shape::Listing {
 public:
  using Listing = typename Shape::Listing;
  using Place = typename Listing::Place;
  using Copy = RowCopy<T, typename Shape::Tile>;

  template <typename Gradients, typename KeyTile>
  __device__ TileQueries(const Gradients& d, typename Shape::Info& info, uint32_t stages,
                         const KeyTile& tile)
      : Listing(d, info.window, tile), info_(info), stages_(stages) {}

  using Listing::total;
  __device__ __forceinline__ void fetch(int t) {
    if (const int32_t* id = Listing::id_at(t)) info_.fetched.fetch(t, id);
  }
  __device__ void store(int t) { place(t) = Listing::look_up(t, info_.fetched.at(t)); }
  __device__ const Place& at(int t) const { return place(t); }

  __device__ __forceinline__ void load(int stage, int first) const {
    const AttentionParams& p = d_.attention;
    const uint32_t tile = stages_ + stage * Shape::kStageBytes;
#pragma unroll 1
    for (int r = Copy::first_row(); r < Shape::kTileRows; r += Copy::row_step()) {
      const Place place = at(first + r);
      const bool exists = place.query >= 0;
      const int query = max(place.query, 0), head = head_ + place.head;
      Copy::copy(tile, r, row_at<const T>(d_.q(), b_, query, head),
                 exists ? static_cast<int>(p.head_dim) : 0, d_.aligned);
      Copy::copy(tile + Shape::kTileBytes, r, row_at<const T>(d_.of_dout(), b_, query, head),
                 exists ? static_cast<int>(p.value_dim) : 0, d_.aligned);
    }
    const uint32_t statistics = tile + 2 * Shape::kTileBytes;
    for (int r = threadIdx.x; r < Shape::kTileRows; r += blockDim.x) {
      const Place place = at(first + r);
      const int64_t row = (int64_t{b_} * p.heads + head_ + place.head) * p.seqlen_q;
      const int64_t from = row + d_.query_at(max(place.query, 0));
      copy_word_or_zero(statistics + r * 4, d_.minus_lse + from, place.query >= 0);
      copy_word_or_zero(statistics + (Shape::kTileRows + r) * 4, d_.minus_delta + from,
                        place.query >= 0);
    }
    commit_copies();
  }

 private:
  using Listing::b_, Listing::d_, Listing::head_;

  __device__ Place& place(int t) const { return info_.places[t % (4 * Shape::kTileRows)]; }

  typename Shape::Info& info_;
  uint32_t stages_;
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

template <typename T, int kBucket, typename Walk>
__device__ __forceinline__ void listed_query_gradients(const typename Walk::Gradients& d) {
  using Shape = QuerySideShape<T, kBucket>;
  using Tile = typename Shape::Tile;
  using Source = KeySource<T, Shape, Walk, Tile, Tile>;
  extern __shared__ __align__(128) unsigned char shared[];
  auto& table = *reinterpret_cast<typename Source::Table*>(shared);
  const uint32_t stages = shared_address(shared + sizeof(table));
  const uint32_t owned = stages + 2 * Shape::kStageBytes;

  const AttentionParams& p = d.attention;
  const auto q = Walk::Queries::of(d);
  if (q.rows <= 0) return;
  find_keys<Walk>(d, q, table);
  const int tile_rows = 16 * d.row_warps;
  const auto row_of = [&](const auto& rows) {
    return [&](int r) { return row_at<const T>(rows, q.b, q.place(r), q.head_of(r)); };
  };
  load_owned<Tile, T>(owned, tile_rows, q.rows, p.head_dim, d.aligned, row_of(d.q()));
  load_owned<Tile, T>(owned + tile_rows * Shape::kRowBytes, tile_rows, q.rows, p.value_dim,
                      d.aligned, row_of(d.of_dout()));
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

  Source source{d, table, stages};
  stream_rows<Shape::kTileRows>(source, [&](int stage, int tile) {
    if (!active) return;
#pragma unroll 1
    for (int k = 0; k < Shape::kTileRows; k += Shape::kStep) {
      const Seeing seen = table.ring.seen_by(tile + k + lane % Shape::kStep);
      if (!__any_sync(kFullWarp, seen.by_any(first_position, last_position))) continue;
      const bool whole = __all_sync(kFullWarp, seen.by_all(first_position, last_position));
      warp.add_step(
          stages + stage * Shape::kStageBytes, k, whole,
          [&](int kind, int, int i) { return statistics[kind][i / 2]; },
          [&](int n, int i) {
            const int key = 8 * n + lane % 4 * 2 + i % 2;
            return table.ring.seen_by(tile + k + key).by(position[i / 2]);
          });
    }
  });
  if (!active) return;
  warp.template store<true>(p.scale, q.rows - first, static_cast<int>(p.head_dim), [&](int r) {
    return rows_at<T>(d.dq, q.b, q.query(first + r), q.head_of(first + r));
  });
}

template <typename T, int kBucket, typename Walk>
__device__ __forceinline__ void listed_key_gradients(const typename Walk::Gradients& d) {
  using Shape = KeySideShape<T, kBucket, typename Walk::template Listing<T, kBucket>>;
  using Tile = typename Shape::Tile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared + Shape::kInfoBytes);
  const uint32_t owned = stages + 2 * Shape::kStageBytes;
  auto& info = *reinterpret_cast<typename Shape::Info*>(shared);

  const AttentionParams& p = d.attention;
  const int tile_rows = 16 * d.row_warps;
  const auto tile = Walk::KeyTile::of(d);
  if (!tile.exists()) return;
  const auto row_of = [&](const auto& of) {
    return [&](int r) { return row_at<const T>(of, tile.b, tile.place(r), tile.kv_head); };
  };
  load_owned<Tile, T>(owned, tile_rows, tile.seen, p.head_dim, d.aligned, row_of(d.k()));
  load_owned<Tile, T>(owned + tile_rows * Shape::kRowBytes, tile_rows, tile.seen, p.value_dim,
                      d.aligned, row_of(d.v()));
  commit_copies();

  GradientWarp<T, kBucket, Side::keys> warp(p, d.row_warps, owned);
  const typename Walk::WarpKeys keys(d, tile, 16 * warp.row_warp());
  const int lane = threadIdx.x % kWarpSize;
  if (tile.seen > 0) {
    TileQueries<T, Shape> queries(d, info, stages, tile);
    queries.each_window([&] {
      stream_rows<Shape::kTileRows>(queries, [&](int stage, int first) {
#pragma unroll 1
        for (int k = 0; k < Shape::kTileRows; k += Shape::kStep) {
          const auto column = [&](int i) {
            return queries.column(queries.at(first + k + i), keys);
          };
          const auto own = column(lane % Shape::kStep);
          if (!__any_sync(kFullWarp, keys.any_seen(own))) continue;
          const bool whole = __all_sync(kFullWarp, keys.all_seen(own));
          const uint32_t at =
              stages + stage * Shape::kStageBytes + 2 * Shape::kTileBytes + (k + lane % 4 * 2) * 4;
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
    return [&](int r) { return rows_at<T>(of, tile.b, tile.key(first + r), tile.kv_head); };
  };
  wait_for_copies<0>();
  warp.template store<true>(p.scale, tile.rows - first, static_cast<int>(p.head_dim), to(d.dk));
  warp.template store<false>(1, tile.rows - first, static_cast<int>(p.value_dim), to(d.dv));
}

}  // namespace tokenmill::cuda
