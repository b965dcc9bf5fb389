// Key-side kernel of the sm_90a backward, see kernel_backward_sm90.cu.
//
// A CTA owns 64 keys of one key block. A producer warp loads K and V once, iterates over the query
// blocks that see any of the keys, and loads Q, dO, lse and delta for 64 rows at a time. One
// consumer warpgroup computes. Accumulators are [keys, queries]: converted to 16 bits, they are the
// A operands of dV and dK without a change of layout.
#pragma once
#include "attention/backward_store.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "cuda/arch/sm90/wgmma.cuh"
#include "cuda/launch.cuh"
#include "sparse/block_sparse_attention/kernel_requests_backward.cuh"
#include "sparse/block_sparse_attention/kernel_sm90_shape.cuh"
#include "sparse/block_sparse_attention/launch_backward_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// A CTA is one producer and one consumer warpgroup. Two CTAs share an SM.
template <int kHeadDim_>
struct Sm90KeyShape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kKeys = 64;
  static constexpr int kTileQueries = 64;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 2 * kWarpgroupThreads;
  static constexpr int kLoadRegisters = 56, kMultiplyRegisters = 200;  // 128 at launch
  static constexpr int kTileBytes = 64 * kHeadDim * 2;
};

// Queries of a tile: its columns are `count` queries from position `first` on. If `listed`, the
// queries list the key block and see all its keys, up to the causal mask; else they see only sink
// and recent keys. count < 0 marks the end of the stream.
struct alignas(16) QueryMask {
  int first, count, listed, padding;
};

// Queries of the request of a key tile; same fields as BatchQueries and PackedQueries.
struct Sm90Queries {
  int b, start, end, list_row, blocks, diagonal;

  // Called by all lanes of a warp.
  __device__ static Sm90Queries of(const BlockSparseGradients& d, const RequestKeyTile& tile) {
    const int queries = static_cast<int>(d.attention.seqlen_q), size = 1 << d.log2_block_q;
    if (!d.attention.cu_seqlens_q)
      return {tile.request, 0, queries, 0, (queries + size - 1) / size, tile.length - queries};
    const PackedQueries q(d, tile);
    return {q.b, q.start(), q.end(), q.list_row(), q.blocks(), q.diagonal};
  }
};

template <typename Shape>
struct alignas(1024) Sm90KeyShared {
  char k[Shape::kTileBytes], v[Shape::kTileBytes];
  char q[Shape::kStages][Shape::kTileBytes];
  char dout[Shape::kStages][Shape::kTileBytes];
  float minus_lse[Shape::kStages][Shape::kTileQueries];
  float minus_delta[Shape::kStages][Shape::kTileQueries];
  QueryMask visibility[Shape::kStages];
  RequestKeyTile tile;  // kept here to save registers
  Sm90Queries queries;
  Mbarrier keys_full, part_full;  // part_full: tiles with rows to be zeroed before use
  Mbarrier full[Shape::kStages], empty[Shape::kStages];

  __device__ void init_barriers() {
    keys_full.init(1), part_full.init(1);
    for (int i = 0; i < Shape::kStages; ++i)
      full[i].init(1), empty[i].init(kWarpgroupThreads / kWarpSize);
    publish_mbarriers();
  }
};

struct Sm90KeyGradients : BlockSparseGradients {
  CUtensorMap query_map, dout_map, key_map, value_map;
};

// Producer warp.
template <typename Shape>
class Sm90QueryLoader {
 public:
  static constexpr int kHeadDim = Shape::kHeadDim, kQueries = Shape::kTileQueries;
  using Shared = Sm90KeyShared<Shape>;

  __device__ Sm90QueryLoader(const Sm90KeyGradients& d, Shared& shared)
      : d_(d), shared_(shared), tile_(shared.tile), queries_(shared.queries) {
    const RequestKeyTile tile = RequestKeyTile::of(d);
    const Sm90Queries queries = Sm90Queries::of(d, tile);
    if (issues()) shared.tile = tile, shared.queries = queries;
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    load_keys();
    const AttentionParams& p = d_.attention;
    const int group = static_cast<int>(p.heads / p.kv_heads);
    const int together = static_cast<int>(d_.heads_together());
#pragma unroll 1
    for (int head = 0; head < group && tile_.seen > 0; head += together)
      load_list(tile_.kv_head * group + head, together);
    const Stage<Shape> stage(tiles_);
    wait_as_warp(shared_.empty[stage.index], stage.parity ^ 1);
    if (!issues()) return;
    shared_.visibility[stage.index] = {0, -1, 0, 0};
    shared_.full[stage.index].arrive();
  }

 private:
  static constexpr int kNoBlock = 0x7fffffff;

  static __device__ bool issues() { return threadIdx.x == 0; }

  __device__ void load_keys() {
    if (!issues()) return;
    shared_.keys_full.arrive_expecting(2 * Shape::kTileBytes);
    const BoxPlace at{tile_.key(0), tile_.kv_head, tile_.b};
    load_boxes<Shape::kKeys, kHeadDim>(d_.key_map, at, shared_.k, shared_.keys_full);
    load_boxes<Shape::kKeys, kHeadDim>(d_.value_map, at, shared_.v, shared_.keys_full);
  }

  // Streams the query blocks of the heads that share the list of `head`, in order: blocks before
  // `open` see some of the keys as sink or recent keys, later ones only if they list the key block.
  __device__ __forceinline__ void load_list(int head, int together) {
    const int log2_size = d_.log2_block_q, last_key = tile_.first + tile_.seen - 1;
    const int to_row = queries_.diagonal + queries_.start;  // offset from query index to position
    const int begin = d_.causal ? max(tile_.first - to_row, 0) >> log2_size : 0;
    int open = begin;
    if (tile_.first < d_.num_sink)
      open = queries_.blocks;
    else if (d_.num_recent > 0)
      open = min(static_cast<int64_t>(queries_.blocks),
                 (last_key + d_.num_recent - to_row + (1 << log2_size) - 1) >> log2_size);
    const int64_t h = queries_.b * d_.list.heads + d_.list_head(head);
    const int32_t* const offsets =
        d_.offsets + h * (d_.key_blocks() + 1) + (tile_.first >> d_.log2_block_k);
    const int32_t* const listing = d_.listing + h * d_.list.rows * d_.list.entries;
    const int listing_end = offsets[1], lane = threadIdx.x % kWarpSize;
    int at = offsets[0];
    for (int high = listing_end; at < high;) {
      const int middle = at + (high - at) / 2;
      listing[middle] - queries_.list_row < begin ? at = middle + 1 : high = middle;
    }
    // Each lane holds one of the next entries; `used` of them are consumed.
    const auto entry = [&](int e) {
      return e < listing_end ? listing[e] - queries_.list_row : kNoBlock;
    };
    int own = entry(at + lane), used = 0;
#pragma unroll 1
    for (int block = begin; block < queries_.blocks; ++block) {
      const int next = __shfl_sync(kFullWarp, own, used);
      if (block >= open) block = max(block, next);
      if (block >= queries_.blocks) return;
      const bool listed = block == next;
      if (listed && ++used == kWarpSize) {
        used = 0;
        at += kWarpSize;
        own = entry(at + lane);
      }
#pragma unroll 1
      for (int i = 0; i < together << (log2_size - 6); ++i)
        load_tile(head + i % together, (block << log2_size) + i / together * kQueries, listed);
    }
  }

  // Loads queries `first` and on of the request.
  __device__ __forceinline__ void load_tile(int head, int first, bool listed) {
    const int row = queries_.start + first, count = min(queries_.end - row, kQueries);
    const int position = row + queries_.diagonal;
    if (count <= 0 || (d_.causal && position + count <= tile_.first)) return;
    const Stage<Shape> stage(tiles_++);
    const int s = stage.index;
    wait_as_warp(shared_.empty[s], stage.parity ^ 1);
    const int64_t statistics =
        (int64_t{queries_.b} * d_.attention.heads + head) * d_.attention.seqlen_q + row;
#pragma unroll
    for (int j = threadIdx.x; j < kQueries; j += kWarpSize) {
      shared_.minus_lse[s][j] = j < count ? d_.minus_lse[statistics + j] : -infinity();
      shared_.minus_delta[s][j] = j < count ? d_.minus_delta[statistics + j] : 0;
    }
    __syncwarp();
    // Rows of the next request are zeroed, as TMA zeroes rows past the tensor: see Sm90Loader.
    const bool cleared = d_.attention.cu_seqlens_q && count < kQueries;
    Mbarrier& full = cleared ? shared_.part_full : shared_.full[s];
    if (issues()) {
      const BoxPlace at{row, head, queries_.b};
      shared_.visibility[s] = {position, count, listed, 0};
      full.arrive_expecting(2 * Shape::kTileBytes);
      load_boxes<kQueries, kHeadDim>(d_.query_map, at, shared_.q[s], full);
      load_boxes<kQueries, kHeadDim>(d_.dout_map, at, shared_.dout[s], full);
    }
    if (!cleared) return;
    wait_as_warp(full, parts_++ % 2);
    clear_rows<kQueries, kHeadDim>(shared_.q[s], count);
    clear_rows<kQueries, kHeadDim>(shared_.dout[s], count);
    fence_stores();
    __syncwarp();
    if (issues()) shared_.full[s].arrive();
  }

  const Sm90KeyGradients& d_;
  Shared& shared_;
  const RequestKeyTile& tile_;
  const Sm90Queries& queries_;
  unsigned tiles_ = 0,
           parts_ = 0;  // counts so far; parts_ counts tiles that went through part_full
};

// Consumer warpgroup.
template <typename T, typename Shape>
class Sm90KeyRows {
 public:
  static constexpr int kKeys = Shape::kKeys, kQueries = Shape::kTileQueries;
  static constexpr int kHeadDim = Shape::kHeadDim;
  // Issue dP before the softmax where registers allow it; else dP reuses the registers of S.
  static constexpr bool kEarly = kHeadDim <= 64;
  using Shared = Sm90KeyShared<Shape>;

  __device__ Sm90KeyRows(const Sm90KeyGradients& d, Shared& shared)
      : d_(d), shared_(shared), tile_(shared.tile) {}

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dk_[i] = dv_[i] = 0;
    shared_.keys_full.wait(0);
#pragma unroll 1
    for (unsigned tile = 0;; ++tile) {
      const Stage<Shape> stage(tile);
      shared_.full[stage.index].wait(stage.parity);
      const QueryMask visibility = shared_.visibility[stage.index];
      if (visibility.count < 0) break;
      add_tile(stage.index, visibility);
      release(shared_.empty[stage.index]);
    }
    store();
  }

 private:
  // True if all queries of the tile see all keys.
  __device__ bool all_seen(const QueryMask& q) const {
    const int last = tile_.first + kKeys - 1;
    if (tile_.seen < kKeys || q.count < kQueries || (d_.causal && q.first < last)) return false;
    return q.listed || last < d_.num_sink ||
           (d_.num_recent > 0 && q.first + kQueries - 1 < tile_.first + d_.num_recent);
  }

  // For each of this thread's two keys, the queries that see it, in columns relative to the
  // thread's first one.
  __device__ __forceinline__ RowBounds bounds(const QueryMask& q) const {
    const int own = 2 * static_cast<int>(threadIdx.x % 4);
    RowBounds r;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warpgroup_row(h), key = tile_.first + row;
      int end = row < tile_.seen ? q.count : 0;
      if (!q.listed && key >= d_.num_sink)
        end = d_.num_recent > 0 ? static_cast<int>(min(int64_t{end}, key + d_.num_recent - q.first))
                                : 0;
      r.begin[h] = (d_.causal ? key - q.first : 0) - own;
      r.end[h] = end - own;
    }
    return r;
  }

  __device__ __forceinline__ void add_tile(int stage, const QueryMask& visibility) {
    const uint32_t q = shared_address(shared_.q[stage]);
    const uint32_t dout = shared_address(shared_.dout[stage]);
    const uint32_t own = threadIdx.x % 4 * 8;
    float scores[1 + kEarly][kQueries / 2];
    auto &s = scores[0], &dp = scores[kEarly];
    uint32_t p[kQueries / 4], ds[kQueries / 4];
    // S^T = K Q^T
    start_qk<T, kHeadDim, kQueries>(s, shared_address(shared_.k), q);
    // dP^T = V dO^T
    const auto start_dp = [&] {
      start_qk<T, kHeadDim, kQueries>(dp, shared_address(shared_.v), dout);
    };
    if constexpr (kEarly) start_dp();
    wait_for_product<kEarly ? 1 : 0>(s);
    const bool cut = !all_seen(visibility);
    if (cut) bounds(visibility).hide(s, true, true);
    unroll<kQueries / 8>([&](auto n) {
      const float2 lse = load_float2<n * 32>(shared_address(shared_.minus_lse[stage]) + own);
      unroll<2>([&](auto h) {
        // P = 2^(factor S - lse)
        const float x = fmaf(s[4 * n + 2 * h], d_.factor, lse.x);
        const float y = fmaf(s[4 * n + 2 * h + 1], d_.factor, lse.y);
        p[2 * n + h] = pack<T>(exp2_approx(x), exp2_approx(y));
      });
    });
    if constexpr (!kEarly) start_dp();
    wait_for_product<0>(dp);
    unroll<kQueries / 8>([&](auto n) {
      // Otherwise ptxas loads all deltas before the multiplications, and registers run out.
      if constexpr (!kEarly && n == kQueries / 16) __syncwarp();
      const float2 delta = load_float2<n * 32>(shared_address(shared_.minus_delta[stage]) + own);
      unroll<2>([&](auto h) {
        const float2 w = unpack<T>(p[2 * n + h]);
        // dS = P (dP - delta)
        const float x = w.x * (dp[4 * n + 2 * h] + delta.x);
        const float y = w.y * (dp[4 * n + 2 * h + 1] + delta.y);
        ds[2 * n + h] = pack<T>(x, y);
      });
    });
    if (cut) clear_hidden(ds, p);
    // dV += P^T dO, dK += dS^T Q
    start_pv<T, kQueries>(dv_, p, dout);
    start_pv<T, kQueries>(dk_, ds, q);
    wait_for_product<0>(dk_);
    fence_accumulators(dv_);
  }

  __device__ __forceinline__ void store() {
    const int lane = threadIdx.x % kWarpSize, first = warpgroup_row(0) - lane / 4;
    // Keys past the end of the request: their sums may be 0 times Inf or NaN.
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i)
      if (warpgroup_row(i / 2 % 2) >= tile_.seen) dk_[i] = dv_[i] = 0;
    const auto store_rows = [&](const Rows& to, const float (&x)[kHeadDim / 2], float factor) {
      store_accumulators<1, T, 1, kHeadDim / 16>(
          reinterpret_cast<const float (&)[1][kHeadDim / 8][4]>(x), factor,
          rows_at<T>(to, tile_.b, tile_.key(first), tile_.kv_head), to.seq, tile_.rows - first, 0,
          kHeadDim, lane);
    };
    store_rows(d_.dv, dv_, 1);
    store_rows(d_.dk, dk_, d_.attention.scale);
  }

  const Sm90KeyGradients& d_;
  Shared& shared_;
  const RequestKeyTile& tile_;  // valid once keys_full has completed
  float dk_[kHeadDim / 2], dv_[kHeadDim / 2];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90KeyShape<kHeadDim>::kThreads, 2)
    block_sparse_keys_sm90_kernel(const __grid_constant__ Sm90KeyGradients d) {
  using Shape = Sm90KeyShape<kHeadDim>;
  if (fill_loose_keys<T>(d)) return;
  extern __shared__ __align__(1024) char sm90_shared[];
  auto& shared = *reinterpret_cast<Sm90KeyShared<Shape>*>(sm90_shared);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  // Broadcast from lane 0, so that the compiler knows the value is warp-uniform.
  if (__shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) == 0) {
    shrink_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < kWarpSize) Sm90QueryLoader<Shape>(d, shared).run();
  } else {
    grow_registers<Shape::kMultiplyRegisters>();
    Sm90KeyRows<T, Shape>(d, shared).run();
  }
}

// Uses the TMA descriptors of the query-side kernel.
template <typename T, int kHeadDim>
const char* launch_keys_sm90(const Sm90Launch& queries, const BlockSparseGradients& g,
                             cudaStream_t stream) {
  using Shape = Sm90KeyShape<kHeadDim>;
  using QueryShape = Sm90Shape<kHeadDim>;
  static_assert(Shape::kTileQueries == QueryShape::kRows && Shape::kKeys == QueryShape::kTileKeys);
  const AttentionParams& p = queries.attention;
  Sm90KeyGradients plan{g};
  static_cast<BlockSparseLaunch&>(plan) = queries;
  plan.factor = queries.scores.factor;
  plan.query_map = queries.query_map;
  plan.dout_map = queries.out_map;
  plan.key_map = queries.key_map;
  plan.value_map = queries.value_map;
  plan.tile_rows = Shape::kKeys;
  plan.tiles = static_cast<int>(max_tiles(p.cu_seqlens_k, p.batch, p.seqlen_k, plan.tile_rows));
  return launch<block_sparse_keys_sm90_kernel<T, kHeadDim>>(
      (p.cu_seqlens_k ? 1 : p.batch) * p.kv_heads * plan.tiles, Shape::kThreads,
      sizeof(Sm90KeyShared<Shape>), stream, plan);
}

}  // namespace tokenmill::cuda::block_sparse_attention
