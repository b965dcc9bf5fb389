// Rows on their way between global memory, shared memory and fragments, for the backward.
#pragma once
#include "cuda/copy.cuh"
#include "cuda/mma.cuh"
#include "cuda/tile.cuh"
#include "cuda/unroll.cuh"
#include "cuda/warp.cuh"
#include "dense/attention/kernel_backward_terms.cuh"

namespace tokenmill::cuda {

// Read anew wherever they are used.
__device__ __forceinline__ unsigned thread_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

__device__ __forceinline__ unsigned thread_count() {
  unsigned x;
  asm volatile("mov.u32 %0, %%ntid.x;" : "=r"(x));
  return x;
}

// Ends a basic block. ptxas mixes what lies within one, until more is live than there are
// registers. `positive` is what it cannot know.
__device__ __forceinline__ void end_block(int positive) {
  asm volatile("{ .reg .pred p; setp.eq.s32 p, %0, 0; @p exit; }" ::"r"(positive) : "memory");
}

// A word from global to shared memory in the background, or 0.
__device__ __forceinline__ void copy_word_or_zero(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(wanted ? 4 : 0));
}

template <typename T>
__device__ __forceinline__ void store_element(uint32_t address, T x) {
  if constexpr (sizeof(T) == 4)
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x));
  else
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address),
                 "h"(reinterpret_cast<const uint16_t&>(x)));
}

// Threads side by side in a row of a tile; each copies every kLanes-th chunk.
template <typename Tile>
constexpr int kCopyLanes = Tile::kChunks % 16 == 0  ? 16
                           : Tile::kChunks % 8 == 0 ? 8
                                                    : 4;

// The copy of a tile without checks by one warp.
template <int kRows, typename Tile, typename T>
__device__ __forceinline__ void copy_whole_rows(uint32_t tile, const T* from, int64_t stride) {
  constexpr int kElements = kChunkBytes / sizeof(T), kLanes = kCopyLanes<Tile>;
  constexpr int kStep = kWarpSize / kLanes;  // rows
  const unsigned lane = thread_index() % kWarpSize, row = lane / kLanes, chunk = lane % kLanes;
  tile += Tile::offset(row, chunk);
  from += row * stride + chunk * kElements;
  unroll<kRows / kStep>([&](auto r) {
    // Rows of one lane differ in the high bits of what permutes their chunks.
    constexpr int kPermuted = Tile::kSwizzledChunks == 8 ? r * kStep % 8 : r * kStep / 2 % 4;
    unroll<Tile::kChunks / kLanes>([&](auto c) {
      copy_async<r * kStep * Tile::kRowBytes + c * kLanes * kChunkBytes>(
          tile ^ kPermuted * kChunkBytes, from + c * kLanes * kElements);
    });
    from += kStep * stride;
  });
}

// `rows` rows at `from`, `stride` elements apart, to a tile of kRows; zeros beyond them and beyond
// dim columns. `thread` of `threads` takes part. The copies are not committed.
template <int kRows, typename Tile, typename T>
__device__ __forceinline__ void copy_rows(uint32_t tile, const T* from, int64_t stride, int rows,
                                          int dim, bool vectors, int thread, int threads) {
  constexpr int kElements = kChunkBytes / sizeof(T), kLanes = kCopyLanes<Tile>;
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
        copy_async_or_zero(to, at, left > 0);
        continue;
      }
#pragma unroll 1
      for (int i = 0; i < kElements; ++i)
        store_element(to + i * sizeof(T), i < left ? at[i] : static_cast<T>(0.f));
    }
}

// load<kOffset>(address) of the 64 bytes kPart of a row whose chunk 0 .. 3 is at `address`.
template <typename Tile, int kPart, typename Load>
__device__ __forceinline__ void at_part(uint32_t address, const Load& load) {
  if constexpr (Tile::kSwizzledChunks == 8)
    load(address ^ (kPart % 2 * 64), Index<kPart / 2 * 128>{});
  else
    load(address, Index<kPart * 64>{});
}

// The same for the 32 bytes kPart.
template <typename Tile, int kPart, typename Load>
__device__ __forceinline__ void at_half_part(uint32_t address, const Load& load) {
  at_part<Tile, kPart / 2>(address ^ (kPart % 2 * 32), load);
}

template <int kOffset>
__device__ __forceinline__ void load_floats(float (&to)[4], uint32_t address) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(address), "n"(kOffset));
}
template <int kOffset>
__device__ __forceinline__ int load_int(uint32_t address) {
  int x;
  asm volatile("ld.shared.s32 %0, [%1 + %2];" : "=r"(x) : "r"(address), "n"(kOffset));
  return x;
}
template <int kOffset>
__device__ __forceinline__ int64_t load_long(uint32_t address) {
  int64_t x;
  asm volatile("ld.shared.s64 %0, [%1 + %2];" : "=l"(x) : "r"(address), "n"(kOffset));
  return x;
}
template <int kOffset>
__device__ __forceinline__ float2 load_float2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(address), "n"(kOffset));
  return x;
}
template <int kOffset>
__device__ __forceinline__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1 + %2];" : "=r"(word) : "r"(address), "n"(kOffset));
  return word;
}
template <int kOffset>
__device__ __forceinline__ void store_floats(uint32_t address, const float (&x)[4]) {
  asm volatile("st.shared.v4.f32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address), "n"(kOffset),
               "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
}
template <int kOffset>
__device__ __forceinline__ void store_words(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address), "n"(kOffset),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]));
}

// d = a b + c
template <typename T>
__device__ __forceinline__ void mma_from(float (&d)[4], const Fragment<T, 4>& a,
                                         const Fragment<T, 2>& b, const float (&c)[4]) {
  if constexpr (sizeof(T) == 2) {
    using Atom = std::conditional_t<std::is_same_v<T, __half>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                    cute::SM80_16x8x16_F32BF16BF16F32_TN>;
    Atom::fma(d[0], d[1], d[2], d[3], a.words[0], a.words[1], a.words[2], a.words[3], b.words[0],
              b.words[1], c[0], c[1], c[2], c[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = c[i];
    mma(d, a, b);
  }
}

// Accumulators times factor to a tile; block i of 16 columns lies at block column_of(i).
template <typename T, typename Tile, int kTiles, int kBlocks, typename BlockOf>
__device__ __forceinline__ void put_accumulators(const float (&acc)[kTiles][2 * kBlocks][4],
                                                 float factor, uint32_t tile, int lane,
                                                 const BlockOf& block_of) {
  constexpr int kWords = sizeof(T) / 2;  // of two elements
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const int column = block_of(i / 2) * 16 + i % 2 * 8 + lane % 4 * 2;  // even
        const int byte = column * static_cast<int>(sizeof(T));
        const uint32_t to = tile + Tile::offset(16 * m + 8 * half + lane / 4, byte / kChunkBytes) +
                            byte % kChunkBytes;
        const float x = acc[m][i][2 * half] * factor, y = acc[m][i][2 * half + 1] * factor;
        if constexpr (kWords == 1)
          store_shared(to, pack<T>(x, y));
        else
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y));
      }
}

// The same to `rows` rows of global memory at `to`, 8 bytes at once; block i lies 16 i kBlockStep
// columns from `first` on.
template <int kBlockStep, typename T, int kTiles, int kBlocks>
__device__ __forceinline__ void store_accumulators(const float (&acc)[kTiles][2 * kBlocks][4],
                                                   float factor, T* to, int64_t stride, int rows,
                                                   int first, int dim, int lane) {
  const int g = lane / 4, c = lane % 4;
  // Even lanes take 4 columns of the left half of a block, odd ones of the right: a warp writes
  // whole sectors.
  first += sizeof(T) == 4 ? 2 * c : c % 2 * 8 + c / 2 * 4;
  to += g * stride + first;
#pragma unroll
  for (int m = 0; m < kTiles; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool inside = 16 * m + 8 * half + g < rows;
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        const int column = 16 * i * kBlockStep;
        const float (&left)[4] = acc[m][2 * i];
        const float (&right)[4] = acc[m][2 * i + 1];
        const float x[4] = {left[2 * half] * factor, left[2 * half + 1] * factor,
                            right[2 * half] * factor, right[2 * half + 1] * factor};
        if constexpr (sizeof(T) == 4) {
          if (inside && first + column < dim)
            *reinterpret_cast<float2*>(to + column) = {x[0], x[1]};
          if (inside && first + column + 8 < dim)
            *reinterpret_cast<float2*>(to + column + 8) = {x[2], x[3]};
        } else {
          const uint32_t a = pack<T>(x[0], x[1]), b = pack<T>(x[2], x[3]);
          const uint32_t got = __shfl_xor_sync(kFullWarp, c % 2 ? a : b, 1);
          if (inside && first + column < dim)
            *reinterpret_cast<uint2*>(to + column) = c % 2 ? uint2{got, b} : uint2{a, got};
        }
      }
      to += 8 * stride;
    }
}

// `rows` rows of a tile to global memory, one element at a time, by one warp.
template <typename Tile, typename T>
__device__ __forceinline__ void store_rows(T* to, int64_t stride, int rows, int dim, uint32_t tile,
                                           int lane) {
#pragma unroll 1
  for (int row = 0; row < rows; ++row, to += stride)
#pragma unroll 1
    for (int column = lane; column < dim; column += kWarpSize) {
      const int byte = column * static_cast<int>(sizeof(T));
      const uint32_t at = tile + Tile::offset(row, byte / kChunkBytes) + byte % kChunkBytes;
      if constexpr (sizeof(T) == 4) {
        to[column] = __uint_as_float(load_word<0>(at));
      } else {
        uint16_t x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at));
        reinterpret_cast<uint16_t*>(to)[column] = x;
      }
    }
}

}  // namespace tokenmill::cuda
