// Values of a tile in shared memory, some of which a mask hides from some rows of a warpgroup, on
// compute capability 9.0a: what hidden_values.cuh is for a warp.
#pragma once
#include "cuda/arch/sm90/tma.cuh"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "cuda/arch/sm90/wgmma.cuh"
#include "cuda/attention/hidden_values.cuh"
#include "cuda/attention/weights_sm90.cuh"

namespace tokenmill::cuda {

// Whether some of the values that this thread looks at are not finite, of the first kSeen keys of a
// tile of kTileKeys. Rows see all keys from seen_begin to seen_end - 1: whole 16 of these are
// passed over.
template <typename T, int kColumns, int kTileKeys, int kSeen>
__device__ __forceinline__ bool has_infinite_values(uint32_t values, int seen_begin, int seen_end) {
  constexpr int kBytes = kWarpgroupThreads * 16, kSteps = kSeen / 16;
  uint32_t found = 0, at = values + warpgroup_thread() * 16;
#pragma unroll 1
  for (int i = 0; i < kSteps; ++i, at += kBytes) {
    if (16 * i >= seen_begin && 16 * i + 16 <= seen_end) continue;
    unroll<kColumns / kBoxColumns>([&](auto block) {
      uint32_t w[4];
      load_shared<block * kTileKeys * kBoxRowBytes>(w, at);
#pragma unroll
      for (int j = 0; j < 4; ++j) note_infinite<T>(found, w[j]);
    });
  }
  return found != 0;
}

// o [64, 2 kCount] += P V of the first 4 kWords keys of a tile of kTileKeys: products with finite
// values in the place of others, kKeys at a time in the memory at `clean`, then what rows see of
// the others. seen: from the first key of the tile on. No copy reads `clean`.
template <typename T, int kTileKeys, int kKeys, int kCount, int kWords>
__device__ __forceinline__ void multiply_seen_values(float (&o)[kCount],
                                                     const uint32_t (&p)[kWords], uint32_t values,
                                                     uint32_t clean, int warpgroup,
                                                     const RowBounds& seen) {
  // Of 64 columns: of kKeys, and of the tile.
  constexpr int kBlock = kKeys * kBoxRowBytes, kTileBlock = kTileKeys * kBoxRowBytes;
  static_assert(4 * kWords % kKeys == 0);
  unroll<4 * kWords / kKeys>([&](auto part) {
    sync_warpgroup(warpgroup);  // all are done with the memory
#pragma unroll 1
    for (int at = warpgroup_thread() * 16; at < kKeys * kCount * 4; at += kWarpgroupThreads * 16) {
      uint32_t w[4];
      load_shared(w, values + at / kBlock * kTileBlock + part * kBlock + at % kBlock);
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = make_finite<T>(w[i]);
      store_shared(clean + at, w);
    }
    fence_stores();
    sync_warpgroup(warpgroup);
    constexpr int kPart = kKeys / 4;
    start_pv<T, kKeys>(o, reinterpret_cast<const uint32_t (&)[kPart]>(p[part * kPart]), clean);
    wait_for_product<0>(o);
  });
  const int c = threadIdx.x % 4;
#pragma unroll 1
  for (int key = 0; key < 4 * kWords; ++key) {
    const bool sees[2] = {key >= seen.begin[0] && key < seen.end[0],
                          key >= seen.begin[1] && key < seen.end[1]};
    unroll<kCount / 4>([&](auto n) {
      const uint32_t chunk = n / 8 * kTileBlock + key * kBoxRowBytes + (n % 8 ^ key % 8) * 16;
      const float2 x = unpack<T>(load_word<0>(values + chunk + 4 * c));
      unroll<4>([&](auto i) {
        const float value = i % 2 ? x.y : x.x;
        // 4 x as in add_infinite: a weight of 0 would make NaN of an infinity.
        if (!is_finite<T>(value) && sees[i / 2]) o[4 * n + i] += 4 * value;
      });
    });
  }
}

}  // namespace tokenmill::cuda
