// Tiles of the forward on compute capability 9.0a, and what its parts share.
#pragma once
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "cuda/attention/weights_sm90.cuh"
#include "sparse/block_sparse_attention/kernel_requests.cuh"

namespace tokenmill::cuda::block_sparse_attention {

// A block is one warpgroup that loads and 1 to kMaxWarpgroups that multiply.
// kGradient: of the kernel that makes dQ.
template <int kHeadDim_, bool kGradient_ = false>
struct Sm90Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kGradient = kGradient_;
  static constexpr int kRows = 64;  // of a warpgroup: queries of one head
  static constexpr int kTileKeys = 64;
  // Tiles of keys, and of values, that lie in shared memory: two blocks of one warpgroup fit.
  static constexpr int kStages = kHeadDim <= 64 ? 4 : 2;
  // 128 registers of a thread at the launch are those of two blocks of 256 threads or one of 512.
  static constexpr int kMaxWarpgroups = 3;
  static constexpr int kLoadRegisters = 56, kMultiplyRegisters = 152;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2;
  static constexpr int kKeyBytes = kTileKeys * kHeadDim * 2;
  static constexpr int threads(int warpgroups) { return (1 + warpgroups) * kWarpgroupThreads; }
};

// Who sees a tile of keys: a row at position p those from max(begin, p + low) to
// min(end, p + high) - 1, counted from the first one of the tile.
struct alignas(16) TileSight {
  int begin, end;  // in the tile; end < 0: this is behind the last tile
  int low, high;

  // kRows rows from position `first` on see some of the keys; all of them see all of the 64. Rows
  // behind the last query count too.
  template <int kRows>
  __device__ bool any(int first) const {
    return max(begin, first + low) < min(end, first + kRows - 1 + high);
  }
  template <int kRows>
  __device__ bool all(int first) const {
    return max(begin, first + kRows - 1 + low) <= 0 && min(end, first + high) >= 64;
  }
  // Of the thread's rows, from column `own` of the tile on.
  __device__ __forceinline__ RowBounds bounds(int first, int own) const {
    const int at[2] = {first + warpgroup_row(0), first + warpgroup_row(1)};
    return {{max(begin, at[0] + low) - own, max(begin, at[1] + low) - own},
            {min(end, at[0] + high) - own, min(end, at[1] + high) - own}};
  }
};

// Shared memory of a block. A barrier `full` ends its phase when the copies into its tile are done,
// `empty` when all warps that multiply are done with the tile. `sight` goes with k.
template <typename Shape>
struct alignas(1024) Sm90Shared {
  struct alignas(1024) Rows {
    char q[Shape::kQueryBytes], out[Shape::kQueryBytes];  // kGradient: dO in the place of out
  };

  char k[Shape::kStages][Shape::kKeyBytes];
  char v[Shape::kStages][Shape::kKeyBytes];
  Mbarrier q_full, part_full;  // part: of a tile whose rows do not all count
  Mbarrier k_full[Shape::kStages], k_empty[Shape::kStages];
  Mbarrier v_full[Shape::kStages], v_empty[Shape::kStages];
  TileSight sight[Shape::kStages];

  static constexpr int bytes(int warpgroups) {
    return static_cast<int>(sizeof(Sm90Shared) + warpgroups * sizeof(Rows));
  }
  __device__ Rows& rows(int warpgroup) { return reinterpret_cast<Rows*>(this + 1)[warpgroup]; }

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

// What the host chose for a launch. The rows of a block of queries are units of 64 queries of one
// head: unit u is part u / together of the queries of head u % together of those that share keys.
// BlockSparseLaunch::tiles blocks of `warpgroups` units each have them.
struct Sm90Launch : BlockSparseLaunch {
  CUtensorMap query_map, key_map, value_map, out_map;
  Sm90Scores scores;
  int units, warpgroups;
};

// Words of dS where those of P are 0: a hidden pair's dP need not be finite.
template <int kCount>
__device__ __forceinline__ void clear_hidden(uint32_t (&ds)[kCount], const uint32_t (&p)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    ds[i] &= (p[i] & 0xffff ? 0xffff : 0) | (p[i] >> 16 ? 0xffff0000 : 0);
}

// The queries of a unit, rows first_query .. first_query + queries - 1 of q: none if queries <= 0.
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
