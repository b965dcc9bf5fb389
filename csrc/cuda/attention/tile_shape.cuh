// Tile sizes of the forward kernels.
#pragma once
#include "cuda/tile.cuh"

namespace tokenmill::cuda {

// kBucket is the larger head dimension, rounded up.
template <typename T, int kBucket_>
struct ForwardShape {
  static constexpr int kBucket = kBucket_;
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr int kRowBytes = kBucket * static_cast<int>(sizeof(T));
  static constexpr int kTileKeys = kRowBytes <= 256 ? 64 : kRowBytes <= 512 ? 32 : 16;
  // 16-row tiles of queries per warp: their accumulators take 4 kBucket / 8 registers each.
  static constexpr int kRowTiles = kBucket <= (kFloat ? 64 : 128) ? 2 : 1;
  static constexpr int kWarpRows = 16 * kRowTiles;
  static constexpr int kStepKeys = kFloat ? (kBucket <= 192 ? 16 : 8) : kBucket <= 64 ? 32 : 16;
  static constexpr int kMaskedKeys = kStepKeys < 16 ? kStepKeys : 16;  // of steps with masks
  static constexpr bool kQueryInRegisters = !kFloat || kBucket <= 128;

  using KeyTile = SharedTile<kRowBytes, Swizzle::quad>;
  using ValueTile = SharedTile<kRowBytes, kFloat ? Swizzle::plain : Swizzle::quad>;
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, then values
  static constexpr int kSharedBytes = 2 * kStageBytes;

  // A slice is 64 bytes of a row: 16 per lane of a quad, two products deep.
  static constexpr int kSlices = kRowBytes / 64;
  static constexpr int kSliceProducts = 2;
};

}  // namespace tokenmill::cuda
