// Swizzled tiles in shared memory, free of bank conflicts.
#pragma once
#include <cstdint>

#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

constexpr int kChunkBytes = 16;

// Permutation of the 16-byte chunks of row r. Both are conflict-free for 16-byte accesses along a
// row and for 8 rows at the same chunk (ldmatrix).
enum class Swizzle {
  plain,  // chunk ^ r: also for chunks l, l + 1 of the even (or odd) rows among 8
  quad,   // chunk ^ rotated bits of r: also for chunks 4 j .. 4 j + 3 of two neighbouring rows
};

template <int kRowBytes_, Swizzle kSwizzle>
struct SharedTile {
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  // Chunk indices that differ in a bit from here up differ by a constant offset in every row.
  static constexpr int kSwizzledChunks = kChunks % 8 == 0 ? 8 : 4;
  // Adjacent threads along a copied row; each takes every kCopyLanes-th chunk.
  static constexpr int kCopyLanes = kChunks % 16 == 0 ? 16 : kChunks % 8 == 0 ? 8 : 4;
  static_assert(kRowBytes % 64 == 0);

  // Rows of an odd multiple of 64 bytes alternate between the halves of the 32 banks by themselves.
  __device__ static int swizzle(int row) {
    if constexpr (kSwizzledChunks == 4) return (row >> 1) & 3;
    if constexpr (kSwizzle == Swizzle::plain) return row & 7;
    return (row & 1) << 2 | ((row >> 1) & 3);
  }
  // Byte offset of a chunk. offset(row + 8 n, chunk) = offset(row, chunk) + 8 n kRowBytes.
  __device__ static int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * kChunkBytes;
  }
};

// Calls load(address, Index<offset>) for part kPart (64 bytes) of a row whose chunk 0 .. 3 is at
// `address`.
template <typename Tile, int kPart, typename Load>
__device__ __forceinline__ void at_part(uint32_t address, const Load& load) {
  if constexpr (Tile::kSwizzledChunks == 8)
    load(address ^ (kPart % 2 * 64), Index<kPart / 2 * 128>{});
  else
    load(address, Index<kPart * 64>{});
}

// The same for 32-byte part kPart.
template <typename Tile, int kPart, typename Load>
__device__ __forceinline__ void at_half_part(uint32_t address, const Load& load) {
  at_part<Tile, kPart / 2>(address ^ (kPart % 2 * 32), load);
}

}  // namespace tokenmill::cuda
