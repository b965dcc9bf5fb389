// Shared-memory addresses of a lane's K and V fragments in a pipeline stage.
#pragma once
#include "cuda/arch/ldmatrix.cuh"
#include "cuda/arch/opaque.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/tile.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// K addresses, one per pattern of the swizzle; the rest are immediate offsets.
template <typename Shape>
struct KeyAddresses {
  using KeyTile = typename Shape::KeyTile;
  static constexpr int kKeys = KeyTile::kSwizzledChunks / 4;
  uint32_t key[kKeys];

  __device__ explicit KeyAddresses(uint32_t tile)
      : KeyAddresses(tile, static_cast<int>(threadIdx.x % kWarpSize)) {}
  __device__ KeyAddresses(uint32_t tile, int lane) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) key[i] = tile + KeyTile::offset(lane / 4, 4 * i + lane % 4);
  }

  // 16 bytes of slice kSlice of key kRow + g: column g of two MMAs.
  template <int kRow, int kSlice>
  __device__ __forceinline__ void load_keys(uint32_t (&words)[4]) const {
    load_shared<kRow * Shape::kRowBytes + kSlice / kKeys * kKeys * 64>(words, key[kSlice % kKeys]);
  }
};

// K and V addresses of a stage. kLean: half of the V addresses are recomputed at each use, for
// kernels short of registers.
template <typename Shape, bool kLean>
struct StageAddresses : KeyAddresses<Shape> {
  using ValueTile = typename Shape::ValueTile;
  using KeyAddresses<Shape>::key;
  static constexpr int kValues = Shape::kFloat ? 2 : ValueTile::kSwizzledChunks / 2;

  static constexpr int kStored = kLean ? kValues / 2 : kValues;
  static_assert(!kLean || !Shape::kFloat);

  uint32_t value[kStored];

  __device__ explicit StageAddresses(uint32_t stage)
      : StageAddresses(stage, static_cast<int>(threadIdx.x % kWarpSize)) {}
  __device__ StageAddresses(uint32_t stage, int lane) : KeyAddresses<Shape>(stage, lane) {
    const int g = lane / 4, c = lane % 4;
#pragma unroll
    for (int i = 0; i < kStored; ++i)
      value[i] = stage + Shape::kTileBytes +
                 (Shape::kFloat ? ValueTile::offset(2 * c + i, g)
                                : ValueTile::offset(lane % 16, 2 * i + lane / 16));
#pragma unroll
    for (uint32_t& x : key) opt_barrier(x);
#pragma unroll
    for (uint32_t& x : value) opt_barrier(x);
  }

  __device__ __forceinline__ void move(int bytes) {
#pragma unroll
    for (uint32_t& x : key) x += bytes, opt_barrier(x);
#pragma unroll
    for (uint32_t& x : value) x += bytes, opt_barrier(x);
  }

  // Start of the V tile.
  __device__ __forceinline__ uint32_t values() const {
    int lane = threadIdx.x % kWarpSize;
    opt_barrier(lane);
    return value[0] - (Shape::kFloat ? ValueTile::offset(2 * (lane % 4), lane / 4)
                                     : ValueTile::offset(lane % 16, lane / 16));
  }

  // Rows kRow .. kRow + 15 of V, columns 16 kPair ... + 15: word 2 i + k is word k of column tile
  // i.
  template <int kRow, int kPair>
  __device__ __forceinline__ void load_values(uint32_t (&words)[4]) const {
    uint32_t address = value[kPair % kStored];
    if constexpr (kPair % kValues >= kStored)
      asm volatile("xor.b32 %0, %0, %1;" : "+r"(address) : "n"(kStored * 32));
    ldmatrix_trans<kRow * Shape::kRowBytes + kPair / kValues * kValues * 32>(words, address);
  }

  // float: rows kRow + 2 c + kOdd of V, columns 32 kGroup + 4 g ... + 3, one for each of 4 column
  // tiles.
  template <int kRow, int kOdd, int kGroup>
  __device__ __forceinline__ void load_float_values(uint32_t (&words)[4]) const {
    load_shared<kRow * Shape::kRowBytes + kGroup * 128>(words, value[kOdd]);
  }
};

}  // namespace tokenmill::cuda
