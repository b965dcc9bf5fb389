// Tile shapes and shared memory of the sm_90a forward.
#pragma once
#include "attention/score_map_sm90.cuh"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "sparse/block_sparse_attention/kernel_requests.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// A CTA is one producer warpgroup and 1 to kMaxWarpgroups consumer warpgroups. kGradient selects
// the kernel that computes dQ.
template <int kHeadDim_, bool kGradient_ = false>
struct Sm90Shape {
  static constexpr int kHeadDim = kHeadDim_, kColumns = kHeadDim;
  static constexpr bool kGradient = kGradient_;
  static constexpr int kRows = 64;  // per consumer warpgroup: queries of one head
  static constexpr int kTileKeys = 64;
  // Pipeline stages for K and for V in shared memory, such that two CTAs with one consumer
  // warpgroup each fit on an SM.
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 2;
  // 128 registers per thread at launch allow two CTAs of 256 threads or one of 512 per SM.
  static constexpr int kMaxWarpgroups = 3;
  static constexpr int kLoadRegisters = 56, kMultiplyRegisters = 152;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kKeyBytes = kTileKeys * kHeadDim * 2;
  static constexpr int threads(int warpgroups) { return (1 + warpgroups) * kWarpgroupThreads; }
};

// Mask of a key tile, in columns relative to the first key of the tile: a row at position p sees
// columns max(begin, p + low) to min(end, p + high) - 1.
struct alignas(16) TileMask {
  int begin, end;  // columns of the tile; end < 0 marks the end of the stream
  int low, high;

  // True if any of the kRows rows from position `first` on sees any key; `all`: if each of them
  // sees all 64 keys. Rows past the last query are included.
  template <int kRows>
  __device__ bool any(int first) const {
    return max(begin, first + low) < min(end, first + kRows - 1 + high);
  }
  template <int kRows>
  __device__ bool all(int first) const {
    return max(begin, first + kRows - 1 + low) <= 0 && min(end, first + high) >= 64;
  }
  // Column bounds of this thread's two rows, relative to its column `own` of the tile.
  __device__ __forceinline__ RowBounds bounds(int first, int own) const {
    const int at[2] = {first + warpgroup_row(0), first + warpgroup_row(1)};
    return {{max(begin, at[0] + low) - own, max(begin, at[1] + low) - own},
            {min(end, at[0] + high) - own, min(end, at[1] + high) - own}};
  }
};

// Shared memory of a CTA. A `full` barrier completes its phase when the copies into its stage have
// landed, an `empty` barrier when all consumer warps have released the stage. The mask of a tile
// (`visibility`) is published with its K stage.
template <typename Shape>
struct alignas(1024) Sm90Shared {
  struct alignas(1024) Rows {
    char q[Shape::kQueryBytes], out[Shape::kQueryBytes];  // dO replaces O when kGradient is set
  };

  char k[Shape::kStages][Shape::kKeyBytes];
  char v[Shape::kStages][Shape::kKeyBytes];
  Mbarrier q_full, part_full;  // part_full: tiles with rows to be zeroed before use
  Mbarrier k_full[Shape::kStages], k_empty[Shape::kStages];
  Mbarrier v_full[Shape::kStages], v_empty[Shape::kStages];
  TileMask visibility[Shape::kStages];

  static constexpr int bytes(int warpgroups) {
    return static_cast<int>(sizeof(Sm90Shared) + warpgroups * sizeof(Rows));
  }
  __device__ Rows& rows(int warpgroup) { return reinterpret_cast<Rows*>(this + 1)[warpgroup]; }

  // Memory of a warpgroup for values of a cut tile made finite, kFiniteKeys keys at a time: `out`.
  static constexpr bool kFiniteInKeys = false;
  static constexpr int kFiniteKeys = Shape::kTileKeys;
  __device__ char* finite_values(int warpgroup, int) { return rows(warpgroup).out; }

  __device__ void init_barriers(int warpgroups) {
    const int warps = warpgroups * kWarpgroupThreads / kWarpSize;
    q_full.init(1), part_full.init(1);
    for (int i = 0; i < Shape::kStages; ++i) {
      k_full[i].init(1), k_empty[i].init(warps);
      v_full[i].init(1), v_empty[i].init(warps);
    }
    publish_mbarriers();
  }
};

// Launch parameters chosen by the host. The rows of a query block are split into units of 64
// queries of one head: unit u is part u / together of the queries of head u % together among the
// heads that share keys. BlockSparseLaunch::tiles CTAs of `warpgroups` units each cover them.
struct Sm90Launch : BlockSparseLaunch {
  CUtensorMap query_map, key_map, value_map, out_map;
  Sm90Scores scores;
  int units, warpgroups;
};

// Zeroes dS where P is 0: dP of a masked pair may be Inf or NaN.
template <int kCount>
__device__ __forceinline__ void clear_hidden(uint32_t (&ds)[kCount], const uint32_t (&p)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    ds[i] &= (p[i] & 0xffff ? 0xffff : 0) | (p[i] >> 16 ? 0xffff0000 : 0);
}

// Rows first_query .. first_query + queries - 1 of q, one head; the unit is empty if queries <= 0.
struct Sm90Unit {
  int head, first_query, queries;

  __device__ static Sm90Unit of(const Sm90Launch& d, const TileNumber& number,
                                const RequestBlock& block, int warpgroup) {
    const int together = static_cast<int>(d.heads_together());
    const int u = number.tile * d.warpgroups + warpgroup, part = u / together * 64;
    return {number.head + u % together, block.first_query + part,
            u < d.units ? min(block.queries - part, 64) : 0};
  }
};

}  // namespace tokenmill::cuda::block_sparse_attention
