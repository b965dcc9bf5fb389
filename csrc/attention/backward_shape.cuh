// Arguments, tile sizes and shared-memory layout of the sm_80 backward.
#pragma once
#include <cstddef>

#include "attention/backward_store.cuh"
#include "attention/gmem_to_smem.cuh"
#include "attention/mask.cuh"
#include "attention/pair_mask.cuh"
#include "attention/score_mod_backward.cuh"
#include "cuda/arch/cp_async.cuh"
#include "cuda/arch/ldmatrix.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/arch/opaque.cuh"

namespace tokenmill::cuda {

struct BackwardArgs {
  AttentionBackwardParams p;
  int64_t row_blocks;   // row tiles per sequence; packed: over all sequences
  int heads_per_block;  // on the queries' side: heads of one GQA group
  bool vectors;         // inputs allow 16-byte loads
  bool whole;           // in addition, all rows have kDim elements
  bool store_vectors;   // gradients, which are contiguous, allow 8-byte stores
  bool direct_bias;     // no dimension of dbias is broadcast
  float factor;         // plain modes: from q.k to the argument of the map
  float weight_scale;   // scale of the weights before they are rounded to T
  int64_t head_sums;    // blocks_of_sums()
  MaskBounds bounds;    // of the mask, if the call has one

  int64_t largest_dim() const {
    return p.forward.head_dim > p.forward.value_dim ? p.forward.head_dim : p.forward.value_dim;
  }
};

// Start of shared memory: BlockInfo, a PairInfo per pair, then tile number and PairAddresses of
// each thread.
constexpr int kPairInfoOffset = 128, kTileNumberOffset = 256;

template <typename T, int kDim, Mode kMode>
struct PairShape {
  using Tile = SharedTile<kDim* static_cast<int>(sizeof(T)), Swizzle::plain>;

  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr bool kGeneral = kMode == Mode::general;
  // A fragments of the first product stay in registers.
  static constexpr bool kHeld = !kWide && !(kGeneral && kDim > 128);
  static constexpr int kBudget = kDim <= 64 ? 4 : kDim <= 128 ? 2 : 1;
  static constexpr int kTiles = kWide ? 1 : kGeneral && kDim <= 128 ? kBudget / 2 : kBudget;
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kColumns = kWide ? 16 : kDim <= 128 ? 64 : 32;
  static constexpr int kStep = 16;                      // columns per step
  static constexpr int kDepths = kStep / kMmaDepth<T>;  // MMAs per step of columns
  // Weights are passed to the dS warp in 16 bits where shared memory is the limit.
  static constexpr bool kPacked = !kWide && kDim > 64 && !kGeneral;
  static constexpr int kPlanes = kGeneral ? 2 : 1;

  static constexpr int kSlotBytes = kWarpSize * kChunkBytes;
  static constexpr int kPlaneSlots = kTiles * (kPacked ? 1 : 2);
  static constexpr int kExchangeBytes = kPlanes * kPlaneSlots * kSlotBytes;
  static constexpr int kOwnedBytes = 2 * kRows * Tile::kRowBytes;  // per pair
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

// Index of the sums of a sequence's first 16 rows.
__device__ inline int64_t sums_offset(const BackwardArgs& args, int64_t b, int64_t start,
                                      int64_t h) {
  const AttentionParams& p = args.p.forward;
  return p.cu_seqlens_q ? h * args.head_sums + start / 16 + b : (b * p.heads + h) * args.head_sums;
}

// Named barriers of 64 threads; 0 is __syncthreads().
__device__ __forceinline__ void pair_sync(int barrier) {
  asm volatile("bar.sync %0, 64;" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void pair_arrive(int barrier) {
  asm volatile("bar.arrive %0, 64;" ::"r"(barrier) : "memory");
}
// The same for barrier + 1, whose number is not worth a register.
__device__ __forceinline__ void pair_sync_next(int barrier) {
  asm volatile("{ .reg .b32 next; add.s32 next, %0, 1; bar.sync next, 64; }" ::"r"(barrier)
               : "memory");
}
__device__ __forceinline__ void pair_arrive_next(int barrier) {
  asm volatile("{ .reg .b32 next; add.s32 next, %0, 1; bar.arrive next, 64; }" ::"r"(barrier)
               : "memory");
}

// Rarely needed state of a CTA in shared memory: the mainloop has no registers to spare.
struct BlockInfo {
  int low, high, columns, rows;  // MaskBand, and the number of rows it applies to
  int begin, tiles, total;       // first visible column; tiles per head, and over all heads
  int64_t batch, row_start, first_head;
  const void *x, *y;  // column 0 of the first head of K (or Q) and of V (or dO)
  const float *minus_lse, *minus_delta;
};

// Columns that a pair's rows see; full: columns that all its rows see.
struct PairInfo {
  int begin, end, full_begin, full_end, first_row, padding[3];
};

// BlockInfo at shared address `address`; each read is a load.
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
  // PairInfo of pair `pair`.
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

// A lane's addresses in the tiles of a stage, relative to its start; they advance with the row of a
// step.
struct PairAddresses {
  uint32_t rows;        // B operands of the first product: 8 rows, transposed
  uint32_t columns;     // B operands of the gradient products: 16 rows
  uint32_t statistics;  // per column; plain sigmoid: the constant of its scores
  uint32_t padding;
};

}  // namespace tokenmill::cuda
