// Shapes of K and V tiles in shared memory and of the forward's warp tiles (sm_80).
#pragma once
#include "cuda/tile.cuh"

namespace tokenmill::cuda {

// kBucket: max(head_dim, value_dim), rounded up to a compiled head dimension.
template <typename T, int kBucket_>
struct TileShape {
  static constexpr int kBucket = kBucket_;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowBytes = kBucket * static_cast<int>(sizeof(T));
  static constexpr int kTileKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;

  using KeyTile = SharedTile<kRowBytes, Swizzle::quad>;
  using ValueTile = SharedTile<kRowBytes, kFloat ? Swizzle::plain : Swizzle::quad>;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values

  // A slice is 64 bytes of a row: 16 bytes per lane of a quad, the depth of two MMAs.
  static constexpr int kSlices = kRowBytes / 64;
};

template <typename T, int kBucket>
struct ForwardShape : TileShape<T, kBucket> {
  static constexpr bool kFloat = sizeof(T) == 4;
  // 16-row query tiles per warp; the accumulators of each take 4 kBucket / 8 registers.
  static constexpr int kRowTiles = kBucket <= (kFloat ? 64 : 128) ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kStepKeys = kFloat ? (kBucket <= 192 ? 16 : 8) : kBucket <= 64 ? 32 : 16;
  // keys per step where a mask may apply
  static constexpr int kMaskedKeys = kStepKeys < 16 ? kStepKeys : 16;
  static constexpr bool kQueryInRegisters = !kFloat || kBucket <= 128;
  static constexpr int kSharedBytes = 2 * TileShape<T, kBucket>::kStageBytes;
};

}  // namespace tokenmill::cuda
