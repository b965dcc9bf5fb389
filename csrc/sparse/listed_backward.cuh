// Backward of attention over lists: seven products in two launches without atomics. One kernel owns
// query tiles, the other key tiles, which find their queries through the transposed lists.
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
  static constexpr int shared_bytes(int row_warps) {
    return static_cast<int>(sizeof(KeyTable<T, Keys, Base::kTileRows>)) + 2 * Base::kStageBytes +
           2 * row_warps * Base::kWarpRows * Base::kRowBytes;
  }
};

template <typename T, int kBucket, typename Listing_>
struct KeySideShape : GradientShape<T, kBucket, Side::keys> {
  using Base = GradientShape<T, kBucket, Side::keys>;
  using Listing = Listing_;

  // Query metadata at the start of shared memory.
  struct alignas(128) Info {
    typename Listing::Window window;
    RowRing<Base::kTileRows> ring;
    typename Listing::Place places[4 * Base::kTileRows];
  };
  static constexpr int kInfoBytes = sizeof(Info);

  static constexpr int shared_bytes(int row_warps) {
    return kInfoBytes + 2 * Base::kStageBytes + 2 * row_warps * 16 * Base::kRowBytes;
  }
};

// Row source for stream_rows: the rows of Q and dO that a listing finds for a key tile.
template <typename T, typename Shape>
class TileQueries : public Shape::Listing {
 public:
  using Listing = typename Shape::Listing;
  using Place = typename Listing::Place;
  using Tile = typename Shape::Tile;
  using Copy = RowCopy<T, Tile>;
  static constexpr int kCount = kChunkBytes / sizeof(T);

  template <typename Gradients, typename KeyTile>
  __device__ TileQueries(const Gradients& d, typename Shape::Info& info, uint32_t stages,
                         const KeyTile& tile)
      : Listing(d, info.window, tile), info_(info), stages_(stages) {}

  using Listing::total;
  __device__ __forceinline__ void fetch(int t) {
    if (const int32_t* id = Listing::id_at(t)) info_.ring.fetched.fetch(t, id);
  }
  __device__ __forceinline__ void store(int t) {
    const Place found = Listing::look_up(t, info_.ring.fetched.at(t));
    place(t) = found;
    const auto chunks_of = [&](const auto& rows) {
      return chunks_to<kCount>(rows, max(found.query, 0)) +
             head_chunks_to<kCount>(rows, found.head);
    };
    typename decltype(info_.ring)::Row at{};
    if (d_.compact_queries) at = {chunks_of(d_.q()), chunks_of(d_.of_dout())};
    info_.ring.store(t, at, {found.query < 0 ? Seeing::kMasked : 0, 0});
  }
  __device__ const Place& at(int t) const { return place(t); }

  __device__ __forceinline__ void load(int stage, int first) const {
    const AttentionParams& p = d_.attention;
    const uint32_t tile = stages_ + stage * Shape::kStageBytes;
    if (d_.compact_queries && info_.ring.is_full(first))
      copy_full_tile<Tile, Tile>(tile, info_.ring, first, row_at<const T>(d_.q(), b_, 0, head_),
                                 p.head_dim, row_at<const T>(d_.of_dout(), b_, 0, head_),
                                 p.value_dim);
    else
      load_rows(tile, first);
    const uint32_t statistics = tile + 2 * Shape::kTileBytes;
    for (int r = threadIdx.x; r < Shape::kTileRows; r += blockDim.x) {
      const Place place = at(first + r);
      const int64_t row = (int64_t{b_} * p.heads + head_ + place.head) * p.seqlen_q;
      const int64_t from = row + d_.query_at(max(place.query, 0));
      cp_async_word_zfill(statistics + r * 4, d_.minus_lse + from, place.query >= 0);
      cp_async_word_zfill(statistics + (Shape::kTileRows + r) * 4, d_.minus_delta + from,
                          place.query >= 0);
    }
    cp_async_commit();
  }

 private:
  using Listing::b_, Listing::d_, Listing::head_;

  // Slow path: queries may not exist, and rows may lie anywhere.
  __device__ __forceinline__ void load_rows(uint32_t tile, int first) const {
    const AttentionParams& p = d_.attention;
#pragma unroll 1
    for (int r = Copy::first_row(); r < Shape::kTileRows; r += Copy::row_step()) {
      const Place place = at(first + r);
      const bool exists = place.query >= 0;
      const int query = max(place.query, 0), head = head_ + place.head;
      Copy::copy_to(tile, r, row_at<const T>(d_.q(), b_, query, head),
                    exists ? static_cast<int>(p.head_dim) : 0, d_.aligned);
      Copy::copy_to(tile + Shape::kTileBytes, r, row_at<const T>(d_.of_dout(), b_, query, head),
                    exists ? static_cast<int>(p.value_dim) : 0, d_.aligned);
    }
  }

  __device__ Place& place(int t) const { return info_.places[t % (4 * Shape::kTileRows)]; }

  typename Shape::Info& info_;
  uint32_t stages_;
};

// Copies `count` owned rows to shared memory and zero-fills up to `rows`.
template <typename Tile, typename T, typename RowOf>
__device__ __forceinline__ void load_owned(uint32_t to, int rows, int count, int64_t columns,
                                           bool aligned, const RowOf& row_of) {
  using Copy = RowCopy<T, Tile>;
  for (int r = Copy::first_row(); r < rows; r += Copy::row_step())
    Copy::copy_to(to, r, row_of(min(r, count - 1)), r < count ? static_cast<int>(columns) : 0,
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
  const auto row_of = [&](const auto& rows) {
    return [&](int r) { return row_at<const T>(rows, q.b, q.place(r), q.head_of(r)); };
  };
  load_owned<Tile, T>(owned, d.tile_rows, q.rows, p.head_dim, d.aligned, row_of(d.q()));
  load_owned<Tile, T>(owned + d.tile_rows * Shape::kRowBytes, d.tile_rows, q.rows, p.value_dim,
                      d.aligned, row_of(d.of_dout()));
  cp_async_commit();

  GradientWarp<T, kBucket, Side::queries> warp(p, d.factor, d.row_warps, owned);
  const int first = warp.first(), lane = threadIdx.x % kWarpSize;
  const bool active = first < q.rows;
  const auto position_of = [&](int r) { return q.position(min(first + r, q.rows - 1)); };
  constexpr int kHalves = 2 * Shape::kRowTiles;
  int position[kHalves];
  float statistics[2][kHalves];  // minus lse, minus delta
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    const int row = first + lane / 4 + 8 * i;
    position[i] = position_of(lane / 4 + 8 * i);
    statistics[0][i] = -infinity();
    statistics[1][i] = 0;
    if (row >= q.rows) continue;
    const int64_t at = (q.b * p.heads + q.head_of(row)) * p.seqlen_q + q.query(row);
    statistics[0][i] = d.minus_lse[at];
    statistics[1][i] = d.minus_delta[at];
  }
  const int edge = position_of(lane < kWarpSize / 2 ? 0 : Shape::kWarpRows - 1);
  const bool plain = warp.is_plain() && q.rows - first > Shape::kWarpRows - 16;
  const auto statistic = [&](int kind, int m, int, int i) {
    return statistics[kind][2 * m + i / 2];
  };

  cp_async_wait<0>();
  __syncthreads();
  warp.load_left();
  Source source{d, table, stages};
  stream_rows<Shape::kTileRows>(source, [&](int stage, int tile) {
    if (!active) return;
    const uint32_t at = stages + stage * Shape::kStageBytes;
    if (plain && table.ring.seen_by_all(tile, edge)) {
#pragma unroll 1
      for (int k = 0; k < Shape::kTileRows; k += Shape::kStep)
        warp.template add_step<true, 0, Shape::kRowTiles>(at, k, statistic,
                                                          [](int, int, int) { return true; });
      return;
    }
#pragma unroll 1
    for (int k = 0; k < Shape::kTileRows; k += Shape::kStep) {
      const Seeing seen = table.ring.seen_by(tile + k + lane % Shape::kStep);
      unroll<Shape::kRowTiles>([&](auto m) {
        const int low = __shfl_sync(kFullWarp, position[2 * m], 0);
        const int high = __shfl_sync(kFullWarp, position[2 * m + 1], kWarpSize - 1);
        if (16 * m >= q.rows - first || !__any_sync(kFullWarp, seen.by_any(low, high))) return;
        warp.template add_step<false, m, 1>(at, k, statistic, [&](int, int n, int i) {
          const int key = 8 * n + lane % 4 * 2 + i % 2;
          return table.ring.seen_by(tile + k + key).by(position[2 * m + i / 2]);
        });
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
  const auto tile = Walk::KeyTile::of(d);
  if (!tile.exists()) return;
  const auto row_of = [&](const auto& of) {
    return [&](int r) { return row_at<const T>(of, tile.b, tile.place(r), tile.kv_head); };
  };
  load_owned<Tile, T>(owned, d.tile_rows, tile.seen, p.head_dim, d.aligned, row_of(d.k()));
  load_owned<Tile, T>(owned + d.tile_rows * Shape::kRowBytes, d.tile_rows, tile.seen, p.value_dim,
                      d.aligned, row_of(d.v()));
  cp_async_commit();

  GradientWarp<T, kBucket, Side::keys> warp(p, d.factor, d.row_warps, owned);
  const int first = warp.first();
  const typename Walk::WarpKeys keys(d, tile, first);
  const int lane = threadIdx.x % kWarpSize;
  if (tile.seen > 0) {
    cp_async_wait<0>();
    __syncthreads();
    warp.load_left();
    TileQueries<T, Shape> queries(d, info, stages, tile);
    queries.each_window([&] {
      stream_rows<Shape::kTileRows>(queries, [&](int stage, int begin) {
        const auto column = [&](int i) { return queries.column(queries.at(begin + i), keys); };
        // Bit masks of the queries that see any of this warp's keys, and of those that see all.
        uint64_t any = 0, all = 0;
#pragma unroll
        for (int i = 0; i < Shape::kTileRows; i += kWarpSize) {
          const auto own = column((i + lane) % Shape::kTileRows);
          any |= uint64_t{__ballot_sync(kFullWarp, keys.any_seen(own))} << i;
          all |= uint64_t{__ballot_sync(kFullWarp, keys.all_seen(own))} << i;
        }
        const uint32_t at = stages + stage * Shape::kStageBytes;
        uint32_t statistics_at = at + 2 * Shape::kTileBytes + lane % 4 * 8;
#pragma unroll 1
        for (int k = 0; k < Shape::kTileRows; k += Shape::kStep) {
          constexpr unsigned kMask = (1u << Shape::kStep) - 1;
          const unsigned some = static_cast<unsigned>(any) & kMask;
          const unsigned whole = static_cast<unsigned>(all) & kMask;
          any >>= Shape::kStep, all >>= Shape::kStep;
          float2 statistics[2][Shape::kStep / 8];  // minus lse, minus delta
          unroll<Shape::kStep / 8>([&](auto n) {
            statistics[0][n] = load_float2<32 * n>(statistics_at);
            statistics[1][n] = load_float2<32 * n + Shape::kTileRows * 4>(statistics_at);
          });
          statistics_at += Shape::kStep * 4;
          if (!some) continue;
          const auto statistic = [&](int kind, int, int n, int i) {
            const float2 both = statistics[kind][n];
            return i % 2 ? both.y : both.x;
          };
          if (whole == kMask && warp.is_plain())
            warp.template add_step<true, 0, 1>(at, k, statistic,
                                               [](int, int, int) { return true; });
          else
            warp.template add_step<false, 0, 1>(at, k, statistic, [&](int, int n, int i) {
              return keys.sees(column(k + 8 * n + lane % 4 * 2 + i % 2), lane / 4 + i / 2 * 8);
            });
        }
      });
    });
  }
  const auto to = [&](const Rows& of) {
    return [&](int r) { return rows_at<T>(of, tile.b, tile.key(first + r), tile.kv_head); };
  };
  cp_async_wait<0>();
  warp.template store<true>(p.scale, tile.rows - first, static_cast<int>(p.head_dim), to(d.dk));
  warp.template store<false>(1, tile.rows - first, static_cast<int>(p.value_dim), to(d.dv));
}

}  // namespace tokenmill::cuda
