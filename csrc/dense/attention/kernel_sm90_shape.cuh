// Tiles of the forward on compute capability 9.0a, and what its parts share.
#pragma once
#include "core/kv_cache.h"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "cuda/attention/mask.cuh"
#include "cuda/attention/weights_sm90.cuh"

namespace tokenmill::cuda {

// A block is one warpgroup that loads and kWarpgroups that multiply.
template <int kHeadDim_>
struct Sm90Shape {
  static constexpr int kHeadDim = kHeadDim_;
  // Of tiles and of O, whole boxes: those behind kHeadDim are zeros, which no product of Q K^T
  // takes.
  static constexpr int kColumns = (kHeadDim + kBoxColumns - 1) / kBoxColumns * kBoxColumns;
  static constexpr int kRows = 64;  // of a warpgroup
  static constexpr int kTileKeys = kHeadDim <= 128 ? 128 : kHeadDim <= 192 ? 96 : 64;
  // Tiles of keys, and of values, that lie in shared memory.
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 2;
  // The accumulators of a warpgroup take kTileKeys / 2 + kColumns / 2 registers of a thread, its
  // weights kTileKeys / 4. 64 Ki registers make 128 x 512 or 168 x 384 at the launch.
  static constexpr int kWarpgroups = kHeadDim <= 64 ? 3 : 2;
  static constexpr int kLoadRegisters = kHeadDim <= 64 ? 32 : 24;
  static constexpr int kMultiplyRegisters = kHeadDim <= 64 ? 160 : 240;
  static constexpr int kThreads = (1 + kWarpgroups) * kWarpgroupThreads;
  static constexpr int kBlockRows = kWarpgroups * kRows;
  static constexpr int kQueryBytes = kRows * kColumns * 2;
  static constexpr int kKeyBytes = kTileKeys * kColumns * 2;
  // Of O that go through shared memory at once, as many as fit.
  static constexpr int kOutColumns = kColumns <= 128 ? kColumns : 128;
  static constexpr int kOutBytes = kRows * kOutColumns * 2;
};

// What the host chose for a launch. Blocks take tiles of queries in turn.
struct Sm90Plan : Sm90Scores {
  CUtensorMap q, k, v, out;
  int tiles;          // of all heads
  int tiles_of_head;  // of kBlockRows rows; packed: a bound on those of all sequences
  int heads;          // of all sequences; packed: of one
  int section_heads;  // whose keys and values stay in the L2 cache at once
  KvCache cache;      // where keys lie that are cached; else its seqlens are null
  int box_keys;       // cached: that lie in one page, of a tile
  bool ragged;        // lengths lie on the device
  int least_rows;     // packed: sequences with fewer, and rows without one, are another kernel's
};

// Of a block: rows first .. of head h of sequence b, and the keys that any of them sees. Without a
// sequence (b = -1), its share in the rows that none has, from the first-th on.
struct Sm90Tile {
  int b, h, first;
  PackedRows rows;  // packed: of the sequence, without one of all sequences
  Sequence s;
  MaskBand band;
  int begin, end;  // begin: a multiple of the tile of keys
};

// Shared memory of a block. A barrier `full` ends its phase when the copies into its tile are done,
// `empty` when all warps that multiply are done with the tile.
template <typename Shape>
struct alignas(1024) Sm90Shared {
  char q[Shape::kWarpgroups][Shape::kQueryBytes];
  char out[Shape::kWarpgroups][Shape::kOutBytes];
  char k[Shape::kStages][Shape::kKeyBytes];
  char v[Shape::kStages][Shape::kKeyBytes];
  Sm90Tile tiles[2];  // of a round and of the one before, whose rows are on their way out
  Mbarrier q_full, q_empty;
  Mbarrier k_full[Shape::kStages], k_empty[Shape::kStages];
  Mbarrier v_full[Shape::kStages], v_empty[Shape::kStages];

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

// Tile `index`, for all lanes of a warp together. Heads come in sections; within one the last rows
// of all heads come first, because they see most keys under a causal mask.
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
      // All tiles are 2^30 at most, see has_sm90_tiles.
      const TilePlace place = find_tile<int>(p.cu_seqlens_q, p.batch, p.seqlen_q, kRows,
                                             in_section / heads, 0, plan.least_rows);
      tile.b = place.b;
      tile.rows = place.rows;
      // From the end of the tensor on there are no rows.
      const bool none = place.b < 0 && plan.least_rows > 0;
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
