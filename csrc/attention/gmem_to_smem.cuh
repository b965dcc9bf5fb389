// Copies of rows from global memory to tiles of shared memory.
#pragma once
#include "cuda/load_tile.cuh"
#include "cuda/warp.cuh"

namespace tokenmill::cuda {

// Copies a full tile, without bounds checks, by one warp.
template <int kRows, typename Tile, typename T>
__device__ __forceinline__ void copy_whole_rows(uint32_t tile, const T* from, int64_t stride) {
  constexpr int kElements = kChunkBytes / sizeof(T), kLanes = Tile::kCopyLanes;
  constexpr int kStep = kWarpSize / kLanes;  // rows
  const unsigned lane = thread_index() % kWarpSize, row = lane / kLanes, chunk = lane % kLanes;
  tile += Tile::offset(row, chunk);
  from += row * stride + chunk * kElements;
  unroll<kRows / kStep>([&](auto r) {
    // A lane's rows differ in the high bits of the swizzle pattern.
    constexpr int kPermuted = Tile::kSwizzledChunks == 8 ? r * kStep % 8 : r * kStep / 2 % 4;
    unroll<Tile::kChunks / kLanes>([&](auto c) {
      cp_async<r * kStep * Tile::kRowBytes + c * kLanes * kChunkBytes>(
          tile ^ kPermuted * kChunkBytes, from + c * kLanes * kElements);
    });
    from += kStep * stride;
  });
}

// Copies `rows` rows at `from`, `stride` elements apart, to a tile of kRows; zeros beyond them and
// beyond dim columns. Called by `threads` threads, this one being number `thread`. The copies are
// not committed.
template <int kRows, typename Tile, typename T>
__device__ __forceinline__ void copy_rows(uint32_t tile, const T* from, int64_t stride, int rows,
                                          int dim, bool vectors, int thread, int threads) {
  constexpr int kElements = kChunkBytes / sizeof(T), kLanes = Tile::kCopyLanes;
  const int first = thread % kLanes, step = threads / kLanes;
  int row = thread / kLanes;
  from += row * stride + first * kElements;
#pragma unroll 1
  for (; row < kRows; row += step, from += step * stride)
#pragma unroll 1
    for (int chunk = first; chunk < Tile::kChunks; chunk += kLanes) {
      const int left = row < rows ? dim - chunk * kElements : 0;
      const T* at = from + (chunk - first) * kElements;
      const uint32_t to = tile + Tile::offset(row, chunk);
      if (vectors) {
        cp_async_zfill(to, at, left > 0);
        continue;
      }
#pragma unroll 1
      for (int i = 0; i < kElements; ++i)
        store_element(to + i * sizeof(T), i < left ? at[i] : static_cast<T>(0.f));
    }
}

// Row-wise copies: this thread's chunks of one row after another.
template <typename T, typename Tile_>
struct RowCopy {
  using Tile = Tile_;
  static constexpr int kCount = kChunkBytes / sizeof(T);
  static constexpr int kLanes = Tile::kCopyLanes;

  static __device__ int first_row() { return threadIdx.x / kLanes; }
  static __device__ int row_step() { return blockDim.x / kLanes; }
  static __device__ int own_lane() { return threadIdx.x % kLanes; }

  // Copies `columns` elements of a row, then zeros; `to`: address of the row's first chunk for this
  // lane.
  static __device__ __forceinline__ void copy(uint32_t to, int lane, const T* row, int columns,
                                              bool aligned) {
    const int own = lane * kCount;
#pragma unroll
    for (int c = 0; c < Tile::kChunks; c += kLanes) {
      const int left = columns - own - c * kCount;
      const T* from = row + (left > 0 ? own + c * kCount : 0);
      if (aligned)
        cp_async_zfill(to + c * kChunkBytes, from, left > 0);
      else
        copy_elements(to + c * kChunkBytes, from, left);
    }
  }
  // The same, to row r of a tile.
  static __device__ __forceinline__ void copy_to(uint32_t tile, int r, const T* row, int columns,
                                                 bool aligned) {
    const int lane = own_lane();
    copy(tile + Tile::offset(r, lane), lane, row, columns, aligned);
  }
};

// from + chunks * 16 bytes in one instruction, which the compiler does not find.
__device__ __forceinline__ const void* chunks_behind(const void* from, uint32_t chunks) {
  const void* to;
  asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(to) : "r"(chunks), "n"(kChunkBytes), "l"(from));
  return to;
}

// This thread's chunks of the rows of a tile, one row after another.
template <typename T, typename Tile>
struct ChunkCopy {
  static constexpr int kCount = kChunkBytes / sizeof(T);
  static constexpr int kLanes = Tile::kCopyLanes;
  static constexpr int kRows = kWarpSize / kLanes;  // rows per warp
  static constexpr int kParts = Tile::kChunks / kLanes;
  static_assert(Tile::kSwizzledChunks == 8);

  const T* from[kParts];
  int bytes[kParts];

  // row: base that row offsets are relative to
  __device__ __forceinline__ ChunkCopy(const T* row, int columns) {
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int column = (i * kLanes + lane) * kCount;
      from[i] = row + (column < columns ? column : 0);
      bytes[i] = column < columns ? kChunkBytes : 0;
      opt_barrier(from[i]);
    }
  }

  // Byte offset in a tile of this thread's first chunk, in one of 8 rows of its warp.
  static __device__ __forceinline__ uint32_t own() {
    const int lane = threadIdx.x % kWarpSize;
    return threadIdx.x / kWarpSize * 8 * Tile::kRowBytes +
           Tile::offset(lane / kLanes, lane % kLanes);
  }

  // Copies the row at offset `chunks` from the base to row kRow of the 8 rows that start at `own`;
  // kOffset: bytes.
  template <int kRow, int kOffset>
  __device__ __forceinline__ void copy(uint32_t own, uint32_t chunks) const {
    const uint32_t to = own ^ Tile::swizzle(kRow) * kChunkBytes;
    unroll<kParts>([&](auto i) {
      cp_async_bytes<kOffset + kRow * Tile::kRowBytes + i * kLanes * kChunkBytes>(
          to, chunks_behind(from[i], chunks), bytes[i]);
    });
  }
};

}  // namespace tokenmill::cuda
