// Tile shapes, tile scheduler and shared memory of the sm_90a forward.
#pragma once
#include "attention/mask.cuh"
#include "attention/score_map_sm90.cuh"
#include "core/kv_cache.h"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"

namespace tokenmill::cuda {

// A CTA has one producer warpgroup and kWarpgroups consumer warpgroups.
template <int kHeadDim_>
struct Sm90Shape {
  static constexpr int kHeadDim = kHeadDim_;
  // Columns of the tiles and of O, whole TMA boxes: columns from kHeadDim on are zeros, which Q K^T
  // skips.
  static constexpr int kColumns = (kHeadDim + kBoxColumns - 1) / kBoxColumns * kBoxColumns;
  static constexpr int kRows = 64;  // per consumer warpgroup
  static constexpr int kTileKeys = kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 96 : 64;
  // Pipeline stages of K tiles, and of V tiles.
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 2;
  // S and O take kTileKeys / 2 + kColumns / 2 registers per thread, P takes kTileKeys / 4. The
  // register file of 64 Ki allows 128 per thread x 512 threads or 168 x 384 at launch.
  static constexpr int kWarpgroups = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kLoadRegisters = kHeadDim <= 64 ? 32 : 24;
  static constexpr int kMultiplyRegisters = kHeadDim <= 64 ? 160 : 240;
  static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
  static constexpr int kBlockRows = kWarpgroups * kRows;
  static constexpr int kQueryBytes = kRows * kColumns * 2;
  static constexpr int kKeyBytes = kTileKeys * kColumns * 2;
  // Columns of O staged through shared memory at once, as many as fit.
  static constexpr int kOutColumns = kColumns <= 128 ? kColumns : 128;
  static constexpr int kOutBytes = kRows * kOutColumns * 2;
};

// Launch plan, made on the host, of the persistent kernel.
struct Sm90Plan : Sm90Scores {
  CUtensorMap q, k, v, out;
  int tiles;  // over all heads
  // tiles of kBlockRows rows per head; packed: an upper bound over all sequences
  int tiles_of_head;
  int heads;          // over all sequences; packed: of one
  int section_heads;  // heads of a section, whose K and V stay in the L2 cache together
  KvCache cache;      // the KV cache; without one its seqlens are null
  int box_keys;       // cached: keys of a tile that one TMA box loads, all in one page
  bool ragged;        // lengths are read on the device
  // packed: rows of shorter sequences, and rows without a sequence, are left to another kernel
  int min_rows;
};

// Work tile: rows from `first` on of head h of sequence b, and the range of keys that any of them
// sees. b = -1: a share of the rows that belong to no sequence, from the first-th on.
struct Sm90Tile {
  int b, h, first;
  PackedRows rows;  // packed: rows of the sequence; b = -1: rows of all sequences
  Sequence s;
  MaskBand band;
  int begin, end;  // begin is a multiple of kTileKeys
};

// Shared memory of a CTA. A `full` mbarrier completes its phase when the TMA copies into its tile
// have landed, an `empty` one when all consumer warps have released the tile.
template <typename Shape>
struct alignas(1024) Sm90Shared {
  char q[Shape::kWarpgroups][Shape::kQueryBytes];
  char out[Shape::kWarpgroups][Shape::kOutBytes];
  char k[Shape::kStages][Shape::kKeyBytes];
  char v[Shape::kStages][Shape::kKeyBytes];
  Sm90Tile tiles[2];  // double-buffered: the epilogue of the previous tile still reads its entry
  Mbarrier q_full, q_empty;
  Mbarrier k_full[Shape::kStages], k_empty[Shape::kStages];
  Mbarrier v_full[Shape::kStages], v_empty[Shape::kStages];

  // Memory of a warpgroup for values of a cut tile made finite, kFiniteKeys keys at a time: `out`.
  static constexpr bool kFiniteInKeys = false;
  static constexpr int kFiniteKeys =
      Shape::kOutBytes / (2 * Shape::kColumns) / kWgmmaDepth * kWgmmaDepth;
  __device__ char* finite_values(int warpgroup, int) {
    if (warpgroup_thread() == 0) wait_for_stores();
    return out[warpgroup];
  }

  __device__ void init_barriers() {
    constexpr int kWarps = Shape::kWarpgroups * kWarpgroupThreads / 32;
    q_full.init(1), q_empty.init(kWarps);
    for (int i = 0; i < Shape::kStages; ++i) {
      k_full[i].init(1), k_empty[i].init(kWarps);
      v_full[i].init(1), v_empty[i].init(kWarps);
    }
    publish_mbarriers();
  }
};

// Work tile `index`, called by all lanes of a warp. L2-aware LPT order: heads come in sections;
// within one the last row blocks of all heads come first, since they see the most keys under a
// causal mask.
template <typename Shape>
__device__ inline Sm90Tile find_sm90_tile(const AttentionParams& p, const Sm90Plan& plan,
                                          int index) {
  constexpr int kRows = Shape::kBlockRows;
  const int section_tiles = plan.section_heads * plan.tiles_of_head;
  const int first_head = index / section_tiles * plan.section_heads;
  const int heads = min(plan.section_heads, plan.heads - first_head);
  const int in_section = index % section_tiles;
  const int head = first_head + in_section % heads;
  Sm90Tile tile{head / static_cast<int>(p.heads), head % static_cast<int>(p.heads),
                in_section / heads * kRows};
  if (plan.ragged) {
    tile.rows = {0, static_cast<int>(p.seqlen_q)};
    if (p.cu_seqlens_q) {
      // At most 2^30 tiles in all, see has_sm90_tiles.
      const TilePlace place = find_tile<int>(p.cu_seqlens_q, p.batch, p.seqlen_q, kRows,
                                             in_section / heads, 0, plan.min_rows);
      tile.b = place.b;
      tile.rows = place.rows;
      // Rows without a sequence are left to another kernel: start beyond the tensor.
      const bool none = place.b < 0 && plan.min_rows > 0;
      tile.first = none ? static_cast<int>(p.seqlen_q) : place.tile * kRows;
      if (tile.b < 0) return tile;
    }
    if (plan.cache.seqlens)
      tile.s = {tile.rows.start, 0, tile.rows.length, static_cast<int>(plan.cache.length(tile.b))};
    else
      tile.s = sequence_of(p, tile.b, tile.rows);
  } else {
    tile.s = {0, 0, static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k)};
  }
  tile.first = ((tile.s.q_length + kRows - 1) / kRows - 1) * kRows - tile.first;
  tile.band = MaskBand::of(p, tile.s);
  tile.begin = tile.band.begin(tile.first) / Shape::kTileKeys * Shape::kTileKeys;
  tile.end = tile.band.end(min(tile.first + kRows, tile.s.q_length) - 1);
  return tile;
}

}  // namespace tokenmill::cuda
