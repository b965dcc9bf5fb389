// What a block of the backward is made of: arguments, sizes of tiles, what lies in shared memory.
#pragma once
#include <cstddef>

#include "cuda/arch/cp_async.cuh"
#include "cuda/arch/ldmatrix.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/arch/opaque.cuh"
#include "cuda/attention/gmem_to_smem.cuh"
#include "cuda/attention/mask.cuh"
#include "cuda/attention/pair_mask.cuh"
#include "cuda/attention/score_mod_backward.cuh"
#include "dense/attention/kernel_backward_store.cuh"

namespace tokenmill::cuda {

struct BackwardArgs {
  AttentionBackwardParams p;
  int64_t row_blocks;   // of a sequence, packed: of all
  int heads_per_block;  // of a group of query heads, on the queries' side
  bool vectors;         // inputs may be read 16 bytes at once
  bool whole;           // and all their rows have kDim elements
  bool store_vectors;   // gradients, which are contiguous, may be written 8 bytes at once
  bool direct_bias;     // no dimension of dbias is broadcast
  float factor;         // of q.k in the argument of a plain map
  float weight_scale;   // what weights are multiplied by before they are rounded to T
  int64_t head_sums;    // blocks_of_sums
  MaskBounds bounds;    // of a call with a mask

  int64_t largest_dim() const {
    return p.forward.head_dim > p.forward.value_dim ? p.forward.head_dim : p.forward.value_dim;
  }
};

// Shared memory begins with BlockInfo, PairInfo of each pair, and the number of the tile and
// PairAddresses of each thread.
constexpr int kPairInfoOffset = 128, kTileNumberOffset = 256;

template <typename T, int kDim, Mode kMode>
struct PairShape {
  using Tile = SharedTile<kDim* static_cast<int>(sizeof(T)), Swizzle::plain>;

  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr bool kGeneral = kMode == Mode::general;
  // The left operands of the first product stay in registers.
  static constexpr bool kHeld = !kWide && !(kGeneral && kDim > 128);
  static constexpr int kBudget = kDim <= 64 ? 4 : kDim <= 128 ? 2 : 1;
  static constexpr int kTiles = kWide ? 1 : kGeneral && kDim <= 128 ? kBudget / 2 : kBudget;
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kColumns = kWide ? 16 : kDim <= 128 ? 64 : 32;
  static constexpr int kStep = 16;                      // columns at once
  static constexpr int kDepths = kStep / kMmaDepth<T>;  // products that a step of columns takes
  // 16-bit weights on their way to the warp of dS, where shared memory is what binds.
  static constexpr bool kPacked = !kWide && kDim > 64 && !kGeneral;
  static constexpr int kPlanes = kGeneral ? 2 : 1;

  static constexpr int kSlotBytes = kWarpSize * kChunkBytes;
  static constexpr int kPlaneSlots = kTiles * (kPacked ? 1 : 2);
  static constexpr int kExchangeBytes = kPlanes * kPlaneSlots * kSlotBytes;
  static constexpr int kOwnedBytes = 2 * kRows * Tile::kRowBytes;  // of a pair
  static constexpr int kTileBytes = kColumns * Tile::kRowBytes;
  static constexpr int kStatisticsBytes = 2 * kColumns * 4;
  static constexpr int kStageBytes = 2 * kTileBytes + kStatisticsBytes;

  static constexpr int shared_bytes(int pairs) { return info_bytes(pairs) + tile_bytes(pairs); }
  __host__ __device__ static constexpr int info_bytes(int pairs) {
    return kTileNumberOffset + (kWide ? 0 : pairs * 2 * kWarpSize * 20);
  }

 private:
  static constexpr int tile_bytes(int pairs) {
    const int loop = 2 * kStageBytes + pairs * kExchangeBytes, owned = pairs * kOwnedBytes;
    return !kHeld ? loop + owned : loop > owned ? loop : owned;
  }
};

// Sums of the rows of a sequence, one for each 16 rows: its first.
__device__ inline int64_t sums_offset(const BackwardArgs& args, int64_t b, int64_t start,
                                      int64_t h) {
  const AttentionParams& p = args.p.forward;
  return p.cu_seqlens_q ? h * args.head_sums + start / 16 + b : (b * p.heads + h) * args.head_sums;
}

// Barriers of 64 threads; 0 is that of the block.
__device__ __forceinline__ void pair_sync(int barrier) {
  asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void pair_arrive(int barrier) {
  asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}
// The same for the barrier after it, whose number is not worth a register.
__device__ __forceinline__ void pair_sync_next(int barrier) {
  asm volatile("{ .reg .b32 next; add.s32 next, %0, 1; bar.sync next, 64; }" ::"r"(barrier)
               : "memory");
}
__device__ __forceinline__ void pair_arrive_next(int barrier) {
  asm volatile("{ .reg .b32 next; add.s32 next, %0, 1; bar.arrive next, 64; }" ::"r"(barrier)
               : "memory");
}

// What a block rarely needs, in shared memory: the loop has no registers to spare.
struct BlockInfo {
  int low, high, columns, rows;  // MaskBand, and the rows that it is for
  int begin, tiles, total;  // columns that the block sees: the first, tiles of a head and of all
  int64_t batch, row_start, first_head;
  const void *x, *y;  // column 0 of the first head: k or q, v or dout
  const float *minus_lse, *minus_delta;
};

// Columns that a pair sees, and those that all its rows see; its first row.
struct PairInfo {
  int begin, end, full_begin, full_end, first_row, padding[3];
};

// BlockInfo at `address`; each read is a load.
struct BlockInfoView {
  uint32_t address;

  template <int kOffset>
  __device__ int number() const {
    return load_int<kOffset>(address);
  }
  template <typename T, int kOffset>
  __device__ const T* pointer() const {
    return reinterpret_cast<const T*>(load_long<kOffset>(address));
  }
  __device__ MaskBand band() const {
    return {number<offsetof(BlockInfo, low)>(), number<offsetof(BlockInfo, high)>(), columns()};
  }
  __device__ int columns() const { return number<offsetof(BlockInfo, columns)>(); }
  __device__ int rows() const { return number<offsetof(BlockInfo, rows)>(); }
  __device__ int begin() const { return number<offsetof(BlockInfo, begin)>(); }
  __device__ int tiles() const { return number<offsetof(BlockInfo, tiles)>(); }
  __device__ int total() const { return number<offsetof(BlockInfo, total)>(); }
  __device__ int64_t batch() const { return load_long<offsetof(BlockInfo, batch)>(address); }
  __device__ int64_t row_start() const {
    return load_long<offsetof(BlockInfo, row_start)>(address);
  }
  __device__ int64_t first_head() const {
    return load_long<offsetof(BlockInfo, first_head)>(address);
  }
  // PairInfo
  __device__ bool sees(int pair, int first, int last) const {
    const uint32_t at = pair_address(pair);
    return first < load_int<offsetof(PairInfo, end)>(at) &&
           last >= load_int<offsetof(PairInfo, begin)>(at);
  }
  __device__ bool all_see(int pair, int first, int last) const {
    const uint32_t at = pair_address(pair);
    return first >= load_int<offsetof(PairInfo, full_begin)>(at) &&
           last < load_int<offsetof(PairInfo, full_end)>(at);
  }
  __device__ int first_row(int pair) const {
    return load_int<offsetof(PairInfo, first_row)>(pair_address(pair));
  }

 private:
  __device__ uint32_t pair_address(int pair) const {
    return address + kPairInfoOffset + pair * static_cast<int>(sizeof(PairInfo));
  }
};

// Where a lane finds its parts of the tiles of a stage, counted from it; they move with the row of
// a step.
struct PairAddresses {
  uint32_t rows;        // right operands of its first product: 8 rows, transposed
  uint32_t columns;     // right operands of its sums: 16 rows
  uint32_t statistics;  // of the columns; plain sigmoid: the constant of its scores
  uint32_t padding;
};

}  // namespace tokenmill::cuda
