// The warpgroup version, for sm_90a, of masked_values.cuh: NaN and infinity in values of a
// shared-memory tile that a mask hides from some rows.
#pragma once
#include "attention/masked_values.cuh"
#include "attention/score_map_sm90.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "cuda/arch/sm90/wgmma.cuh"

namespace tokenmill::cuda {

// True if some value that this thread inspects, among the first kSeen keys of a tile of kTileKeys,
// is not finite. All rows see the keys seen_begin .. seen_end - 1: whole 16-key groups of these are
// skipped.
template <typename T, int kColumns, int kTileKeys, int kSeen>
__device__ __forceinline__ bool has_nonfinite(uint32_t values, int seen_begin, int seen_end) {
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

// O [64, 2 kCount] += P V over the first 4 kWords keys of a tile of kTileKeys: products with values
// made finite, kKeys at a time through the buffer `clean`, then the non-finite values that rows do
// see. seen: relative to the first key of the tile. No TMA copy reads `clean`.
template <typename T, int kTileKeys, int kKeys, int kCount, int kWords>
__device__ __forceinline__ void multiply_seen_values(float (&o)[kCount],
                                                     const uint32_t (&p)[kWords], uint32_t values,
                                                     uint32_t clean, int warpgroup,
                                                     const RowBounds& seen) {
  // bytes of 64 columns: of kKeys keys, and of the whole tile
  constexpr int kBlock = kKeys * kBoxRowBytes, kTileBlock = kTileKeys * kBoxRowBytes;
  static_assert(4 * kWords % kKeys == 0);
  unroll<4 * kWords / kKeys>([&](auto part) {
    sync_warpgroup(warpgroup);  // the previous part's reads of `clean` are done
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
        // factor 4 as in add_infinite: a weight of 0 would make NaN of an infinity
        if (!is_finite<T>(value) && sees[i / 2]) o[4 * n + i] += 4 * value;
      });
    });
  }
}

}  // namespace tokenmill::cuda
