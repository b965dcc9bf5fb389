// Tiles of a float8_e4m3fn KV cache: codes are converted on the way from one shared-memory tile to
// another; K scales are applied to scores, V scales to weights.
#pragma once
#include "attention/pv.cuh"
#include "cuda/arch/shared_memory.cuh"
#include "cuda/float8.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/tile.cuh"
#include "cuda/unroll.cuh"

namespace tokenmill::cuda {

// Element type of V in the product, for queries of type T. Weights times scales need the range of
// bfloat16; a float16 weight is split into two bfloat16 (kTwoWeights), which keep more digits than
// one float16.
template <typename T>
using Float8Value = std::conditional_t<sizeof(T) == 4, T, __nv_bfloat16>;
template <typename T>
constexpr bool kTwoWeights = std::is_same_v<T, __half>;

// Not swizzled: codes are copied and read along rows, without bank conflicts.
template <int kBucket>
struct CodeTile {
  static constexpr int kRowBytes = kBucket;
  static constexpr int kChunks = kBucket / kChunkBytes;
  static constexpr int kCopyLanes = kChunks % 16 == 0 ? 16 : kChunks % 8 == 0 ? 8 : 4;
  __device__ static int offset(int row, int chunk) { return row * kRowBytes + chunk * kChunkBytes; }
};

__device__ __forceinline__ void load_codes(uint32_t (&to)[1], uint32_t address) {
  to[0] = load_word<0>(address);
}
__device__ __forceinline__ void load_codes(uint32_t (&to)[2], uint32_t address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(address));
}

// Converts kRows rows of codes to a tile of T, by all threads of a CTA. replace(row, code, words)
// may change the 16 bytes of a row that start at code index `code`.
template <typename T, typename Codes, typename Tile, int kRows, typename Replace>
__device__ __forceinline__ void convert_codes(uint32_t codes, uint32_t tile,
                                              const Replace& replace) {
  constexpr int kCount = kChunkBytes / sizeof(T), kLanes = Tile::kCopyLanes;
  // a lane's further chunks are immediate offsets
  static_assert(kLanes % Tile::kSwizzledChunks == 0);
  const int lane = threadIdx.x % kLanes, step = blockDim.x / kLanes;  // a multiple of 8 rows
  int r = threadIdx.x / kLanes;
  uint32_t from = codes + r * Codes::kRowBytes + lane * kCount, to = tile + Tile::offset(r, lane);
#pragma unroll 1
  for (; r < kRows; r += step) {
#pragma unroll
    for (int i = 0; i < Tile::kChunks / kLanes; ++i) {
      uint32_t words[4], of[4 / sizeof(T)];
      load_codes(of, from + i * kLanes * kCount);
      convert_float8<T>(words, of);
      replace(r, (i * kLanes + lane) * kCount, words);
      store_shared(to + i * kLanes * kChunkBytes, words);
    }
    from += step * Codes::kRowBytes;
    to += step * Tile::kRowBytes;
  }
}

// S *= K scales, for 8 kKeyTiles keys; scales in shared memory.
template <int kKeyTiles>
__device__ __forceinline__ void scale_scores(float (&s)[kKeyTiles][4], uint32_t scales) {
  scales += 8 * (threadIdx.x % 4);
  unroll<kKeyTiles>([&](auto n) {
    const float2 scale = load_float2<32 * n>(scales);
    s[n][0] *= scale.x, s[n][1] *= scale.y;
    s[n][2] *= scale.x, s[n][3] *= scale.y;
  });
}

// P *= V scales. The scale of a key that a row does not see may be infinite or NaN: its weight is
// set to 0. sees(half, key): visibility to row g or g + 8.
template <int kKeyTiles, typename Sees>
__device__ __forceinline__ void scale_weights(float (&e)[kKeyTiles][4], uint32_t scales,
                                              const Sees& sees) {
  scales += 8 * (threadIdx.x % 4);
  bool finite = true;
  unroll<kKeyTiles>([&](auto n) {
    const float2 scale = load_float2<32 * n>(scales);
    finite &= fabsf(scale.x) < infinity() && fabsf(scale.y) < infinity();
    e[n][0] *= scale.x, e[n][1] *= scale.y;
    e[n][2] *= scale.x, e[n][3] *= scale.y;
  });
  if (__all_sync(kFullWarp, finite)) return;
  unsigned seen = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll 1
    for (int i = 0; i < 2 * kKeyTiles; ++i)
      if (sees(half, i / 2 * 8 + 2 * static_cast<int>(threadIdx.x % 4) + i % 2))
        seen |= 1u << (i / 2 * 4 + 2 * half + i % 2);
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(seen >> (4 * n + i) & 1)) e[n][i] = 0;
}

// Loads 16 bytes of float16 values from `column` on as bfloat16; lost: loads the rounding error
// instead.
__device__ __forceinline__ void load_part(uint32_t (&words)[4], const __half* row, int column,
                                          int columns, bool lost) {
  load_elements(words, row, column, columns);
#pragma unroll
  for (uint32_t& word : words) {
    const float2 x = unpack<__half>(word);
    word = pack<__nv_bfloat16>(x.x, x.y);
    const float2 kept = unpack<__nv_bfloat16>(word);
    if (lost)
      word = pack<__nv_bfloat16>(fabsf(kept.x) < infinity() ? x.x - kept.x : 0,
                                 fabsf(kept.y) < infinity() ? x.y - kept.y : 0);
  }
}

// Rounding error of weights as 16-bit T; 0 for infinite ones.
template <typename T, int kKeyTiles>
__device__ __forceinline__ void find_lost(float (&lost)[kKeyTiles][4],
                                          const float (&e)[kKeyTiles][4]) {
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float2 kept = unpack<T>(pack<T>(e[n][i], e[n][i + 1]));
      lost[n][i] = fabsf(kept.x) < infinity() ? e[n][i] - kept.x : 0;
      lost[n][i + 1] = fabsf(kept.y) < infinity() ? e[n][i + 1] - kept.y : 0;
    }
}

// out[kFirst] += P V with V of type Value, for queries of type T. infinite: some value is not
// finite and a mask cuts the step.
template <typename T, typename Value, int kFirst, int kKeys, int kRowTiles, int kTiles,
          typename Addresses, typename Sees>
__device__ __forceinline__ void multiply_scaled(float (&out)[kRowTiles][kTiles][4],
                                                const float (&e)[kKeys / 8][4], const Addresses& at,
                                                bool infinite, const Sees& sees, bool any_sign) {
  Fragment<Value, 4> p[1][kKeys / kMmaDepth<Value>];
  set_fragments(p[0], e);
  const auto nothing = [](auto) {};
  if (infinite)
    multiply_seen_values<Value, kFirst, kKeys>(out, p, at, nothing, sees, any_sign);
  else
    multiply_values<Value, kFirst, 0>(out, p, at, nothing);
  if constexpr (kTwoWeights<T>) {
    float lost[kKeys / 8][4];
    find_lost<Value>(lost, e);
    set_fragments(p[0], lost);
    if (infinite)
      multiply_values<Value, kFirst, 0, true>(out, p, at, nothing);
    else
      multiply_values<Value, kFirst, 0>(out, p, at, nothing);
  }
}

}  // namespace tokenmill::cuda
