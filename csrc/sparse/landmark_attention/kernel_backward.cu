// Backward without atomics: one kernel owns query tiles, the other key tiles. Both begin a tile
// pair by recomputing the statistics of its blocks from S, with queries as rows: the shift of a
// block's exponents (kernel_blocks.cuh), and the mean D of dP under the block's own softmax. Then
// dS = P (dP - delta) as in attention, with
//
//   a key of an earlier block:   P = 2^(t + shift - lse),  delta = D
//   its landmark:                P = 2^(l - lse),  delta = delta - D,  dP = 0 as its value is 0
//   a key of the query's block:  P = 2^(t - lse)
//
// where the landmark's P only enters dS.
#include "attention/backward_statistics.cuh"
#include "cuda/fast_divmod.cuh"
#include "sparse/landmark_attention/cuda_plan.cuh"
#include "sparse/landmark_attention/kernel.cuh"
#include "sparse/listed_gradient.cuh"

namespace tokenmill::cuda::landmark_attention {

struct GradientLaunch {
  AttentionBackwardParams g;
  KeyTiles keys;
  FastDivmod block;
  int tiles;     // query tiles per head
  bool aligned;  // rows are whole 16-byte chunks
};

template <typename T, int kBucket, Side kSide>
struct LandmarkGradientShape : GradientShape<T, kBucket, kSide> {
  using Base = GradientShape<T, kBucket, kSide>;
  static constexpr int kRowTiles = 1, kWarpRows = 16;
  static constexpr bool kLeftInRegisters = false;
  static constexpr int kRows = Base::kTileRows;  // queries and keys per tile
  static constexpr int kRowWarps = kRows / kWarpRows;
  static constexpr int kThreads = kRowWarps * Base::kColumnWarps * kWarpSize;
  static constexpr int kMaxBlocks = kRows / 2;

  // Layout: owned rows of x and y; rows of the other side; on the key side, the other tiles of a
  // long block; query statistics.
  static constexpr int kPairBytes = 2 * Base::kTileBytes;
  static constexpr int kOthersAt = 2 * kPairBytes;
  static constexpr int kKnownAt = kOthersAt + (Base::kKeys ? kPairBytes : 0);
  struct Known {
    float2 blocks[kRows][kMaxBlocks];  // shift, D
    float minus_lse[kRows], minus_delta[kRows];
  };
  static constexpr int kSharedBytes = kKnownAt + static_cast<int>(sizeof(Known));
};

template <typename T, int kBucket, Side kSide>
class LandmarkGradientWarp
    : public GradientWarp<T, kBucket, kSide, LandmarkGradientShape<T, kBucket, kSide>> {
 public:
  using Shape = LandmarkGradientShape<T, kBucket, kSide>;
  using Warp = GradientWarp<T, kBucket, kSide, Shape>;
  using Known = typename Shape::Known;
  using Tile = typename Shape::Tile;
  static constexpr int kTiles = Shape::kRows / 8;

  __device__ LandmarkGradientWarp(const GradientLaunch& launch, uint32_t owned)
      : Warp(launch.g.forward, launch.g.forward.scale * kLog2e, Shape::kRowWarps, owned),
        launch_(launch) {}

  // Accumulates the statistics of 16 query rows at `queries` over one tile, at `keys`, of a long
  // block.
  __device__ __forceinline__ void search(BlockStatistics& found, uint32_t queries, uint32_t keys,
                                         int tile) const {
    float s[kTiles][4], dp[kTiles][4];
    multiply_pairs(s, dp, queries, keys);
    const int first = launch_.keys.first(tile), count = launch_.keys.count_of(tile);
    found.add(BlockColumns::of(launch_.keys, first, count, 0), s, dp);
  }
  // Statistics of the whole blocks of a key tile, for rows `row` .. + 15 of the query tile.
  __device__ __forceinline__ void find(Known& known, int row, uint32_t queries, uint32_t keys,
                                       int tile) const {
    float s[kTiles][4], dp[kTiles][4];
    multiply_pairs(s, dp, queries, keys);
    const int first = launch_.keys.first(tile), count = launch_.keys.count_of(tile);
    const int blocks = BlockColumns::blocks(launch_.keys, count);
#pragma unroll 1
    for (int b = 0; b < blocks; ++b) {
      BlockStatistics found;
      found.clear();
      found.add(BlockColumns::of(launch_.keys, first, count, b), s, dp);
      note(known, row, b, found);
    }
  }
  static __device__ __forceinline__ void note(Known& known, int row, int block,
                                              const BlockStatistics& found) {
    const int lane = threadIdx.x % kWarpSize;
    if (lane % 4) return;
#pragma unroll
    for (int h = 0; h < 2; ++h)
      known.blocks[row + lane / 4 + 8 * h][block] = {found.shift(h), found.mean_of(h)};
  }

  // Key of the tile that starts with key `first`.
  struct Key {
    int position, slot, end;
    bool landmark;

    __device__ bool earlier(int query) const { return query >= end; }
  };
  __device__ __forceinline__ Key key_of(int first, int column) const {
    const int position = first + column, block = launch_.block.divide(position);
    const int end = (block + 1) * launch_.keys.block;
    return {position, launch_.keys.whole() ? block - launch_.block.divide(first) : 0, end,
            position == end - 1};
  }

  // Minus the shifted lse of a pair: row r of the query tile, which is query `query`, and a key.
  static __device__ __forceinline__ float minus_lse(const Known& known, int r, int query,
                                                    const Key& key) {
    const bool shifts = key.earlier(query) && !key.landmark;
    return known.minus_lse[r] + (shifts ? known.blocks[r][key.slot].x : 0);
  }
  static __device__ __forceinline__ float minus_delta(const Known& known, int r, int query,
                                                      const Key& key) {
    if (!key.earlier(query)) return known.minus_delta[r];
    const float mean = known.blocks[r][key.slot].y;
    return key.landmark ? mean + known.minus_delta[r] : -mean;
  }
  __device__ __forceinline__ bool sees(int query, const Key& key) const {
    const bool exist = max(key.position, query) < launch_.keys.tokens;
    return exist && (key.earlier(query) || (key.position <= query && !key.landmark));
  }

  // Zeroes the values of landmarks among this thread's keys `own`.
  __device__ __forceinline__ void clear_values(const Key (&own)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!own[h].landmark) continue;
#pragma unroll
      for (int n = 0; n < 2 * Warp::kBlocks; ++n)
        Warp::of_y_[0][n][2 * h] = Warp::of_y_[0][n][2 * h + 1] = 0;
    }
  }

 private:
  // t = Q K^T and dP = dO V^T for 16 rows at `queries` and the key tile at `keys`; x, then y.
  __device__ __forceinline__ void multiply_pairs(float (&s)[kTiles][4], float (&dp)[kTiles][4],
                                                 uint32_t queries, uint32_t keys) const {
    const int lane = threadIdx.x % kWarpSize;
    const uint32_t left = queries + Tile::offset(lane % 16, lane / 16);
    multiply<0>(s, left, keys + Warp::rows_);
    multiply<1>(dp, left + Shape::kTileBytes, keys + Shape::kTileBytes + Warp::rows_);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] *= Warp::factor_;
  }
  template <int kNumber>
  __device__ __forceinline__ void multiply(float (&out)[kTiles][4], uint32_t left,
                                           uint32_t right) const {
    constexpr int kSteps = Shape::kRows / Shape::kStep;
    unroll<kSteps>([&](auto k) {
      end_block<kNumber * kSteps + k>(launch_.tiles);
      float sums[1][Warp::kStepTiles][4];
#pragma unroll
      for (int n = 0; n < Warp::kStepTiles; ++n)
        sums[0][n][0] = sums[0][n][1] = sums[0][n][2] = sums[0][n][3] = 0;
      Warp::template multiply_rows<0>(sums, Warp::x_, left,
                                      right + k * Shape::kStep * Shape::kRowBytes);
#pragma unroll
      for (int n = 0; n < Warp::kStepTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[k * Warp::kStepTiles + n][i] = sums[0][n][i];
    });
  }

  const GradientLaunch& launch_;
};

// Loads the tiles of one sequence to shared memory.
template <typename T, typename Shape>
struct PairLoader {
  const GradientLaunch& launch;
  int64_t b;

  // The values of landmarks are zeroed.
  __device__ __forceinline__ void keys(uint32_t to, int64_t kv_head, int tile) const {
    const AttentionParams& p = launch.g.forward;
    const KeyTiles& keys = launch.keys;
    const int first = keys.first(tile), count = keys.count_of(tile);
    load(to, p.k, kv_head, first, count, p.head_dim, [](int) { return false; });
    load(to + Shape::kTileBytes, p.v, kv_head, first, count, p.value_dim,
         [&](int key) { return keys.is_landmark(key); });
  }
  __device__ __forceinline__ void queries(uint32_t to, typename Shape::Known& known, int64_t h,
                                          int first) const {
    const AttentionParams& p = launch.g.forward;
    const int left = launch.keys.tokens - first, count = min(left, Shape::kRows);
    const auto none = [](int) { return false; };
    load(to, p.q, h, first, count, p.head_dim, none);
    load(to + Shape::kTileBytes, launch.g.dout, h, first, count, p.value_dim, none);
    const int64_t at = (b * p.heads + h) * p.seqlen_q + first;
    for (int r = threadIdx.x; r < Shape::kRows; r += blockDim.x) {
      known.minus_lse[r] = r < count ? launch.g.minus_lse[at + r] : -infinity();
      known.minus_delta[r] = r < count ? launch.g.minus_delta[at + r] : 0;
    }
  }
  __device__ __forceinline__ void wait() const {
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

 private:
  template <typename Hides>
  __device__ __forceinline__ void load(uint32_t to, const Rows& from, int64_t h, int first,
                                       int rows, int64_t columns, const Hides& hides) const {
    load_rows<typename Shape::Tile, T>(to, Shape::kRows, from, b, h, first, rows, columns,
                                       launch.aligned, hides);
  }
};

template <typename T, int kBucket>
__global__ void __launch_bounds__(LandmarkGradientShape<T, kBucket, Side::queries>::kThreads, 1)
    landmark_queries_kernel(const __grid_constant__ GradientLaunch launch) {
  using Shape = LandmarkGradientShape<T, kBucket, Side::queries>;
  using Warp = LandmarkGradientWarp<T, kBucket, Side::queries>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t owned = shared_address(shared), stage = owned + Shape::kPairBytes;
  auto& known = *reinterpret_cast<typename Shape::Known*>(shared + Shape::kKnownAt);
  const AttentionParams& p = launch.g.forward;
  const KeyTiles& keys = launch.keys;
  const int64_t bh = blockIdx.x / launch.tiles, b = bh / p.heads, h = bh % p.heads;
  // The last queries see the most keys: start with the longest CTAs.
  const int first = (launch.tiles - 1 - static_cast<int>(blockIdx.x % launch.tiles)) * Shape::kRows;
  const int last = min(first + Shape::kRows, keys.tokens) - 1;
  const PairLoader<T, Shape> loader{launch, b};
  loader.queries(owned, known, h, first);
  Warp warp(launch, owned);
  const int row = warp.first(), lane = threadIdx.x % kWarpSize;
  const uint32_t rows = owned + row * Shape::kRowBytes;
  BlockStatistics of_long;
  const int steps = keys.steps(last);
#pragma unroll 1
  for (int n = 0; n < steps; ++n) {
    const KeyTiles::Step step = keys.step(n, last);
    const int at = keys.first(step.tile), count = keys.count_of(step.tile);
    __syncthreads();  // the previous tile has been read
    loader.keys(stage, h / (p.heads / p.kv_heads), step.tile);
    loader.wait();
    if (first + row > last || first + row + 15 < at) continue;
    if (step.search) {
      if (step.tile % keys.parts == 0) of_long.clear();
      warp.search(of_long, rows, stage, step.tile);
      Warp::note(known, row, 0, of_long);
      continue;
    }
    if (keys.whole()) warp.find(known, row, rows, stage, step.tile);
    __syncwarp();
#pragma unroll 1
    for (int k = 0; k < count; k += Shape::kStep) {
      const auto key = [&](int n, int i) {
        return warp.key_of(at, k + 8 * n + lane % 4 * 2 + i % 2);
      };
      const auto own = [&](int i) { return row + lane / 4 + i / 2 * 8; };
      // dQ += dS K
      warp.template add_step<false, 0, 1>(
          stage, k,
          [&](int kind, int, int n, int i) {
            const int r = own(i);
            return kind ? Warp::minus_delta(known, r, first + r, key(n, i))
                        : Warp::minus_lse(known, r, first + r, key(n, i));
          },
          [&](int, int n, int i) {
            return k + 8 * n + lane % 4 * 2 + i % 2 < count && warp.sees(first + own(i), key(n, i));
          });
    }
  }
  warp.template store<true>(p.scale, last + 1 - first - row, static_cast<int>(p.head_dim),
                            [&](int r) { return rows_at<T>(launch.g.dq, b, first + row + r, h); });
}

template <typename T, int kBucket>
__global__ void __launch_bounds__(LandmarkGradientShape<T, kBucket, Side::keys>::kThreads, 1)
    landmark_keys_kernel(const __grid_constant__ GradientLaunch launch) {
  using Shape = LandmarkGradientShape<T, kBucket, Side::keys>;
  using Warp = LandmarkGradientWarp<T, kBucket, Side::keys>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t owned = shared_address(shared), stage = owned + Shape::kPairBytes;
  const uint32_t others = owned + Shape::kOthersAt;
  auto& known = *reinterpret_cast<typename Shape::Known*>(shared + Shape::kKnownAt);
  const AttentionParams& p = launch.g.forward;
  const KeyTiles& keys = launch.keys;
  const int count = keys.count(), tile = static_cast<int>(blockIdx.x % count);
  const int64_t bh = blockIdx.x / count, b = bh / p.kv_heads, kv_head = bh % p.kv_heads;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int first_key = keys.first(tile), rows = keys.count_of(tile);
  const PairLoader<T, Shape> loader{launch, b};
  loader.keys(owned, kv_head, tile);
  Warp warp(launch, owned);
  const int row = warp.first(), lane = threadIdx.x % kWarpSize;
  // first query row whose statistics this warp computes
  const int own_queries = static_cast<int>(threadIdx.x) / kWarpSize * 16;
  // Key of row g + 8 half of this warp, recomputed at each use to save registers.
  const auto own = [&](int half) {
    int own_row = row + lane / 4 + 8 * half;
    opt_barrier(own_row);
    return warp.key_of(first_key, own_row);
  };
  const int block_end = (first_key / keys.block + 1) * keys.block;  // end of the first key's block
#pragma unroll 1
  for (int g = 0; g < group; ++g) {
    const int64_t h = kv_head * group + g;
#pragma unroll 1
    for (int first = first_key / Shape::kRows * Shape::kRows; first < keys.tokens;
         first += Shape::kRows) {
      __syncthreads();  // the previous tile has been read
      loader.queries(stage, known, h, first);
      loader.wait();
      const uint32_t own_rows = stage + own_queries * Shape::kRowBytes;
      const bool finds = own_queries < Shape::kRows;
      if (min(first + Shape::kRows, keys.tokens) > block_end) {
        if (keys.whole()) {
          if (finds) warp.find(known, own_queries, own_rows, owned, tile);
        } else {
          const int begin = tile / keys.parts * keys.parts;
          BlockStatistics of_long;
          of_long.clear();
#pragma unroll 1
          for (int part = begin; part < begin + keys.parts; ++part) {
            __syncthreads();
            loader.keys(others, kv_head, part);
            loader.wait();
            if (finds) warp.search(of_long, own_rows, others, part);
          }
          if (finds) Warp::note(known, own_queries, 0, of_long);
        }
        __syncthreads();
      }
#pragma unroll 1
      for (int k = 0; k < Shape::kRows; k += Shape::kStep) {
        if (first + k + Shape::kStep <= first_key + row) continue;
        const auto query = [&](int n, int i) { return k + 8 * n + lane % 4 * 2 + i % 2; };
        const typename Warp::Key key[2] = {own(0), own(1)};
        // dV += P^T dO, dK += dS^T Q
        warp.template add_step<false, 0, 1>(
            stage, k,
            [&](int kind, int, int n, int i) {
              const int r = query(n, i);
              return kind ? Warp::minus_delta(known, r, first + r, key[i / 2])
                          : Warp::minus_lse(known, r, first + r, key[i / 2]);
            },
            [&](int, int n, int i) {
              return row + lane / 4 + i / 2 * 8 < rows &&
                     warp.sees(first + query(n, i), key[i / 2]);
            });
      }
    }
  }
  warp.clear_values({own(0), own(1)});
  const auto to = [&](const Rows& of) {
    return [&](int r) { return rows_at<T>(of, b, first_key + row + r, kv_head); };
  };
  warp.template store<true>(p.scale, rows - row, static_cast<int>(p.head_dim), to(launch.g.dk));
  warp.template store<false>(1, rows - row, static_cast<int>(p.value_dim), to(launch.g.dv));
}

template <typename T>
const char* launch_landmark(const LandmarkBackwardParams& g, cudaStream_t stream) {
  const AttentionParams& p = g.attention.forward;
  if (const char* error = launch_statistics<T>({.p = g.attention}, false, stream)) return error;
  return visit_bucket(p, [&]<int kBucket>() {
    using Shape = LandmarkGradientShape<T, kBucket, Side::queries>;
    using KeyShape = LandmarkGradientShape<T, kBucket, Side::keys>;
    const KeyTiles keys = KeyTiles::of(p.seqlen_k, g.block, Shape::kTileRows);
    const int64_t tiles = ceil_div(p.seqlen_q, int64_t{Shape::kTileRows});
    const bool aligned =
        has_aligned_rows<T>(p) && has_whole_chunks<T>(g.attention.dout, p.value_dim);
    const GradientLaunch launched{g.attention, keys, FastDivmod::of(keys.block),
                                  static_cast<int>(tiles), aligned};
    if (const char* error = launch<landmark_queries_kernel<T, kBucket>>(
            p.batch * p.heads * tiles, Shape::kThreads, Shape::kSharedBytes, stream, launched))
      return error;
    return launch<landmark_keys_kernel<T, kBucket>>(p.batch * p.kv_heads * keys.count(),
                                                    KeyShape::kThreads, KeyShape::kSharedBytes,
                                                    stream, launched);
  });
}

template const char* launch_landmark<TOKENMILL_ELEMENT>(const LandmarkBackwardParams&,
                                                        cudaStream_t);

}  // namespace tokenmill::cuda::landmark_attention
