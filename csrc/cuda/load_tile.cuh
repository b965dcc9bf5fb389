// Loads tiles of a matrix in global memory into shared memory, by all threads of a CTA.
#pragma once
#include "cuda/arch/cp_async.cuh"
#include "cuda/arch/opaque.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/tile.cuh"
#include "cuda/unroll.cuh"
#include "cuda/vector.cuh"

namespace tokenmill::cuda {

constexpr int kMaxThreads = 256;  // per CTA

// Rows a multiple of `stride` elements apart, with contiguous columns.
template <typename T>
struct GlobalRows {
  const T* data;
  int64_t stride;
  int rows, columns;
  bool aligned;  // rows start at multiples of 16 bytes and consist of whole chunks
};

// 16 bytes from `column` on as words, zero beyond `columns`.
template <typename T>
__device__ __forceinline__ void load_elements(uint32_t (&words)[4], const T* row, int column,
                                              int columns) {
  constexpr int kCount = kChunkBytes / sizeof(T);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    pack.x[i] = column + i < columns ? row[column + i] : static_cast<T>(0.f);
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = reinterpret_cast<const uint32_t (&)[4]>(pack)[i];
}

// The same for 16-byte chunk `chunk`; whole: all chunks of the row exist and are aligned.
template <typename T>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[4], const T* row, int chunk,
                                           int columns, bool whole) {
  const int column = chunk * (kChunkBytes / static_cast<int>(sizeof(T)));
  if (whole) {
    const uint4 x = *reinterpret_cast<const uint4*>(row + column);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  } else {
    load_elements(words, row, column, columns);
  }
}

// Copies the first `columns` elements of a chunk to shared memory, then zeros, one word at a time:
// the path is rare, and the kernels have no registers to spare.
template <typename T>
__device__ __forceinline__ void copy_elements(uint32_t to, const T* from, int columns) {
  constexpr int kCount = kChunkBytes / sizeof(T);
#pragma unroll 1
  for (int i = 0; i < kCount; i += 4 / static_cast<int>(sizeof(T))) {
    Pack<T, 4 / sizeof(T)> pack{};
    for (int j = 0; j < 4 / static_cast<int>(sizeof(T)); ++j)
      if (i + j < columns) pack.x[j] = from[i + j];
    store_shared(to + i * static_cast<int>(sizeof(T)), reinterpret_cast<const uint32_t&>(pack));
  }
}

// Loads successive tiles of kRows rows, with zeros beyond the matrix. CTAs have kMaxThreads threads
// or half as many.
template <typename T, typename Tile, int kRows>
class TileLoader {
 public:
  // Byte stride between the rows that one of `threads` threads loads.
  static int64_t step(int64_t stride, int threads) {
    return threads / kLanes * stride * static_cast<int64_t>(sizeof(T));
  }

  // Byte offset in a tile of this thread's first chunk.
  __device__ static uint32_t own_offset() { return Tile::offset(own_row(), own_chunk()); }

  // step: computed on the host so that it stays a constant operand.
  __device__ TileLoader(const GlobalRows<T>& from, int first, int64_t step)
      : next_(from.data + (first + own_row()) * from.stride + own_chunk() * kCount),
        step_(step),
        rows_(from.rows),
        columns_(from.columns),
        aligned_(from.aligned) {}

  // Loads the next tile, which starts at `row`; tile: address of this thread's first chunk. The
  // caller commits the copies, waits for them and synchronises the CTA.
  __device__ __forceinline__ void load(uint32_t tile, int row) {
    int thread = threadIdx.x, row_step = blockDim.x / kLanes;
    opt_barrier(thread);
    opt_barrier(row_step);
    const int own_column = thread % kLanes * kCount;
    uint32_t to = tile;
#pragma unroll 1
    for (int r = thread / kLanes; r < kRows; r += row_step) {
#pragma unroll 1
      for (int c = 0; c < Tile::kChunks; c += kLanes) {
        const int columns = row + r < rows_ ? columns_ - own_column - c * kCount : 0;
        if (aligned_)
          cp_async_zfill(to + c * kChunkBytes, next_ + c * kCount, columns > 0);
        else
          copy_elements(to + c * kChunkBytes, next_ + c * kCount, columns);
      }
      advance();
      to += row_step * Tile::kRowBytes;
    }
  }

  // The same for a tile that lies within the matrix, in CTAs of kThreads threads.
  template <int kThreads>
  __device__ __forceinline__ void load_whole(uint32_t tile) {
    constexpr int kRowStep = kThreads / kLanes;
    unroll<kRows / kRowStep>([&](auto r) {
      unroll<Tile::kChunks / kLanes>([&](auto c) {
        cp_async<r * kRowStep * Tile::kRowBytes + c * kLanes * kChunkBytes>(
            tile, next_ + c * kLanes * kCount);
      });
      advance();
    });
  }

 private:
  static constexpr int kCount = kChunkBytes / sizeof(T);
  static constexpr int kLanes = Tile::kCopyLanes;
  static_assert(kRows % (kMaxThreads / kLanes) == 0 && kMaxThreads / 2 / kLanes % 8 == 0);

  __device__ static int own_row() { return threadIdx.x / kLanes; }
  __device__ static int own_chunk() { return threadIdx.x % kLanes; }

  __device__ void advance() {
    next_ = reinterpret_cast<const T*>(reinterpret_cast<const char*>(next_) + step_);
    opt_barrier(next_);
  }

  const T* next_;
  int64_t step_;  // byte stride between the rows that a thread loads
  int rows_, columns_;
  bool aligned_;
};

}  // namespace tokenmill::cuda
