// Tile shapes, tile scheduler and shared memory of the sm_90a backward.
#pragma once
#include <type_traits>

#include "attention/mask.cuh"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "cuda/warp.cuh"
#include "dense/attention/launch.cuh"

namespace tokenmill::cuda {

// A CTA has one warpgroup that loads and accumulates dQ, and two consumer warpgroups of 64 keys
// each.
template <int kHeadDim_>
struct Sm90BackwardShape {
  static constexpr bool kWide = false;
  static constexpr int kHeadDim = kHeadDim_;
  // Columns of tiles and accumulators, whole TMA boxes: columns from kHeadDim on are zeros, which S
  // and dP skip.
  static constexpr int kColumns = (kHeadDim + kBoxColumns - 1) / kBoxColumns * kBoxColumns;
  static constexpr int kWarpgroups = 2;
  static constexpr int kRows = 64;  // keys per warpgroup
  static constexpr int kSlabs = kWarpgroups, kBlockKeys = kSlabs * kRows;
  // Queries per tile. The accumulators of S, dP, dK and dV take kTileQueries + kColumns registers
  // per thread, the words of P and dS kTileQueries / 2.
  static constexpr int kTileQueries = sm90_tile_queries(kHeadDim);
  static constexpr int kStages = 2;
  static constexpr int kLoadRegisters = 24, kMultiplyRegisters = 240;  // 168 at launch
  static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
  static constexpr int kSlabBytes = kRows * kColumns * 2;  // of K, of V
  static constexpr int kQueryBytes = kTileQueries * kColumns * 2;
  static constexpr int kScoreBytes = kBlockKeys * kTileQueries * 2;
  // One warpgroup computes a dQ tile, as dQ^T for 128 queries: one product of 64 rows and 128
  // columns reads fewer operands than two of 64.
  static constexpr bool kTransposed = kTileQueries > 64;
  static constexpr int kTileFloats = sm90_tile_floats(kHeadDim);
  static_assert(kTileFloats == 64 * 128);
  static constexpr int kQueryParts = 1;  // parts of a dQ tile, accumulated one by one
  static constexpr int kEmptyBarriers = 1;
};

// Wide heads: both warpgroups share the CTA's 64 keys. The first makes weights and dV, the second
// dS and dK.
template <int kHeadDim_>
struct Sm90WideShape {
  static constexpr bool kWide = true;
  static constexpr int kHeadDim = kHeadDim_, kColumns = kHeadDim;
  static constexpr int kWarpgroups = 2;
  static constexpr int kRows = 64, kSlabs = 1, kBlockKeys = kRows;
  // The accumulators of dV or dK take kHeadDim / 2 registers per thread, S or dP take kTileQueries
  // / 2, which are free again when dQ takes kPartColumns / 2.
  static constexpr int kTileQueries = sm90_tile_queries(kHeadDim);
  static constexpr int kLoadRegisters = 24, kMultiplyRegisters = 240;  // 168 at launch
  static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
  // Stages of Q, and as many of dO as fit: Q is needed longer.
  static constexpr int kStages = 2, kGradientStages = kHeadDim <= 192 ? 2 : 1;
  static constexpr int kSlabBytes = kRows * kColumns * 2;
  static constexpr int kQueryBytes = kTileQueries * kColumns * 2;
  static constexpr int kScoreBytes = kBlockKeys * kTileQueries * 2;
  static constexpr bool kTransposed = false;
  static constexpr int kTileFloats = sm90_tile_floats(kHeadDim);
  static constexpr int kQueryParts = kHeadDim <= 192 ? 1 : 2, kPartColumns = kColumns / kQueryParts;
  // One per warpgroup, since neither waits for its own last part.
  static constexpr int kEmptyBarriers = 2;
};

template <int kHeadDim>
using Sm90BackwardShapeOf =
    std::conditional_t<(kHeadDim > 128), Sm90WideShape<kHeadDim>, Sm90BackwardShape<kHeadDim>>;

// Launch plan, made on the host.
struct Sm90BackwardPlan {
  CUtensorMap q, k, v, dout;
  int query_tiles;             // per head; packed: tile slots of all sequences
  int heads, group;            // KV heads of all sequences, packed: of one; query heads per KV head
  float factor;                // from q.k to the exponent of a weight (fast: the argument of tanh)
  float dq_factor, dv_factor;  // scales of the accumulators; dK has the scale of dQ
  float slope_factor;          // scale of packed slopes in float16
  // softcap: from q.k to the argument of tanh, whose result is multiplied by factor
  float cap_scale;
  float lse_factor;  // from minus_lse to bits
  bool fast;
  bool general;  // scores are capped, or slopes summed: no tile is plain
  // dQ accumulators [query heads of all sequences, query_tiles, kTileFloats], in the order in which
  // threads hold them.
  float* dq;
  int64_t head_sums;  // entries per head in AttentionBackwardParams::sums
  // Zero at launch: begun counts CTAs that have started; turns counts CTAs that have added to each
  // dQ tile.
  unsigned *begun, *turns;
};

// Work tile: keys from `first` on of KV head h of a sequence, and the query tiles that see any of
// them.
struct Sm90KeyTile {
  // rows: keys of the sequence; b = -1: a share of the keys that belong to no sequence
  TilePlace place;
  PackedRows queries;
  MaskBand band;  // queries that a key sees
  // First query tile of the group's first head in dq, and its place in sums.
  int64_t first_tile, first_sum;
  int index, h, first;
  int begin, end;  // query tiles
  // Per slab of kRows keys: queries that see any of its keys (seen), and all of its keys (whole).
  int seen_begin[2], seen_end[2], whole_begin[2], whole_end[2];

  // CTAs get key tiles in the order in which they start. The last keys of a sequence come first:
  // then the CTAs that a dQ tile waits for have started, and under a causal mask the turns need no
  // wait. Called by all lanes of a warp.
  template <typename Shape>
  __device__ static Sm90KeyTile of(const AttentionParams& p, const Sm90BackwardPlan& plan,
                                   unsigned number) {
    constexpr int kQueries = Shape::kTileQueries, kRows = Shape::kRows;
    const int head = static_cast<int>(number % plan.heads), kv_heads = static_cast<int>(p.kv_heads);
    Sm90KeyTile t;
    t.place = {
        head / kv_heads, static_cast<int>(number / plan.heads), {0, static_cast<int>(p.seqlen_k)}};
    t.queries = {0, static_cast<int>(p.seqlen_q)};
    t.h = head % kv_heads;
    t.first_tile = int64_t{head} * plan.group * plan.query_tiles;
    t.first_sum = int64_t{head} * plan.group * plan.head_sums;
    if (p.cu_seqlens_k) {
      t.place = find_tile(p.cu_seqlens_k, p.batch, p.seqlen_k, Shape::kBlockKeys, t.place.tile);
      if (t.place.b < 0) return t;
      t.queries = rows_of_sequence(p.cu_seqlens_q, p.batch, p.seqlen_q, t.place.b);
      t.first_tile += first_slot(t.queries, t.place.b, kQueries);
      t.first_sum += first_slot(t.queries, t.place.b, 16);
    }
    const int keys = t.place.rows.length;
    t.index = (keys - 1) / Shape::kBlockKeys - t.place.tile;
    t.first = t.index * Shape::kBlockKeys;
    t.band = MaskBand::of(t.window(p).transposed(t.queries.length));
    const int last = min(t.first + Shape::kBlockKeys, keys) - 1;
    const int begin = t.band.begin(t.first), end = t.band.end(last);
    t.begin = begin / kQueries;
    t.end = end > begin ? (end + kQueries - 1) / kQueries : t.begin;
#pragma unroll
    for (int w = 0; w < Shape::kSlabs; ++w) {
      const int a = t.first + w * kRows, z = min(a + kRows, keys) - 1;
      t.seen_begin[w] = t.band.begin(a);
      t.seen_end[w] = z >= a ? t.band.end(z) : 0;
      t.whole_begin[w] = t.band.begin(z);
      t.whole_end[w] = z - a == kRows - 1 ? t.band.end(a) : 0;
    }
    return t;
  }
  // sees: some query of a tile sees some key of a slab; is_whole: all queries see all keys.
  template <typename Shape>
  __device__ bool sees(int slab, int query0) const {
    return query0 < seen_end[slab] && query0 + Shape::kTileQueries > seen_begin[slab];
  }
  template <typename Shape>
  __device__ bool is_whole(int slab, int query0) const {
    return query0 >= whole_begin[slab] && query0 + Shape::kTileQueries <= whole_end[slab];
  }
  // Turn of this CTA at a query tile that it sees: after the CTAs of later keys.
  template <typename Shape>
  __device__ unsigned turn(const AttentionParams& p, int tile) const {
    const int last = min((tile + 1) * Shape::kTileQueries, queries.length) - 1;
    return (MaskBand::of(window(p)).end(last) - 1) / Shape::kBlockKeys - index;
  }

 private:
  // band of keys that a query sees
  __device__ Band window(const AttentionParams& p) const {
    return Band::of_window(p.window_left, p.window_right, queries.length, place.rows.length);
  }
};

// Sums of dS per warp, in three slots used in turn: a warp may be two tiles ahead of the dQ warp.
template <int kWarps>
class SlopeSums {
 public:
  __device__ void note(float sum, unsigned number, int warp) {
    sum = warp_sum(sum);
    if (threadIdx.x % kWarpSize == 0) sums_[number % 3][warp] = sum;
  }
  __device__ float of(unsigned number) const {
    float sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += sums_[number % 3][w];
    return sum;
  }

 private:
  float sums_[3][kWarps];
};

// Shared memory of a CTA. A `full` mbarrier completes its phase when its buffer is written, an
// `empty` one when it has been read.
template <typename Shape>
struct alignas(1024) Sm90BackwardShared {
  char k[Shape::kSlabs][Shape::kSlabBytes];
  char v[Shape::kSlabs][Shape::kSlabBytes];
  char q[Shape::kStages][Shape::kQueryBytes];
  char dout[Shape::kStages][Shape::kQueryBytes];
  char ds[2][Shape::kScoreBytes];  // [keys, queries], blocks of 64 queries; double-buffered
  float dq[Shape::kTileFloats];
  float minus_lse[Shape::kStages][Shape::kTileQueries];
  float minus_delta[Shape::kStages][Shape::kTileQueries];
  SlopeSums<Shape::kWarpgroups * kWarpgroupThreads / kWarpSize> slope_sums;
  Mbarrier keys_full, cut_full;  // cut_full: for tiles whose last rows are cleared after the load
  Mbarrier full[Shape::kStages], empty[Shape::kStages];
  Mbarrier dq_full, dq_empty[Shape::kEmptyBarriers];
  Sm90KeyTile keys;  // work tile of the CTA: the mainloop has no registers to spare

  __device__ void init_barriers() {
    constexpr int kWarps = Shape::kWarpgroups * kWarpgroupThreads / 32;
    keys_full.init(1), cut_full.init(1);
    for (int i = 0; i < Shape::kStages; ++i) full[i].init(1), empty[i].init(kWarps);
    dq_full.init(kWarpgroupThreads / 32), dq_empty[0].init(1);
    publish_mbarriers();
  }
};

// Stages of Q with minus_lse in bits, or of dO with minus_delta: separate rings, since a warpgroup
// releases them at different times.
template <typename Shape, int kStages_>
struct QueryStages {
  static constexpr int kStages = kStages_;
  float statistics[kStages][Shape::kTileQueries];
  Mbarrier full[kStages], empty[kStages];

  __device__ void init_barriers() {
    constexpr int kWarps = Shape::kWarpgroups * kWarpgroupThreads / kWarpSize;
    for (int i = 0; i < kStages; ++i) full[i].init(1), empty[i].init(kWarps);
  }
};

template <int kHeadDim>
struct alignas(1024) Sm90BackwardShared<Sm90WideShape<kHeadDim>> {
  using Shape = Sm90WideShape<kHeadDim>;

  char k[Shape::kSlabs][Shape::kSlabBytes];
  char v[Shape::kSlabs][Shape::kSlabBytes];
  char q[Shape::kStages][Shape::kQueryBytes];
  char dout[Shape::kGradientStages][Shape::kQueryBytes];
  char ds[2][Shape::kScoreBytes];                         // [keys, queries], double-buffered
  float slopes[Shape::kBlockKeys * Shape::kTileQueries];  // of the map, in accumulator order
  float dq[Shape::kTileFloats / Shape::kQueryParts];
  QueryStages<Shape, Shape::kStages> queries;
  QueryStages<Shape, Shape::kGradientStages> gradients;
  SlopeSums<kWarpgroupThreads / kWarpSize> slope_sums;
  Mbarrier keys_full, cut_full;
  Mbarrier slopes_full, ds_full;  // ds_full: dS is written, and slopes are read
  Mbarrier dq_full, dq_empty[Shape::kEmptyBarriers];
  Sm90KeyTile keys;

  __device__ void init_barriers() {
    constexpr int kWarps = kWarpgroupThreads / kWarpSize;
    keys_full.init(1), cut_full.init(1);
    queries.init_barriers(), gradients.init_barriers();
    slopes_full.init(kWarps), ds_full.init(kWarps);
    dq_full.init(kWarps), dq_empty[0].init(1), dq_empty[1].init(1);
    publish_mbarriers();
  }
};

}  // namespace tokenmill::cuda
