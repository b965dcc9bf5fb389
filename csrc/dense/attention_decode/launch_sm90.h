// Tile shape of the sm_90a decode kernel, and its launch.
#pragma once
#include "attention/rules_sm90.h"
#include "dense/attention_decode/kernel_shape.cuh"
#include "dense/attention_decode/kernels.h"

namespace tokenmill::cuda {

// A CTA has one consumer warpgroup and one producer warp; two CTAs run per SM.
template <int kHeadDim_>
struct DecodeSm90Shape {
  static constexpr int kHeadDim = kHeadDim_, kColumns = kHeadDim;
  static constexpr int kRows = kMaxSm90DecodeRows;
  static constexpr int kTileKeys = 64;  // all of one page
  static constexpr int kPartKeys = 16;  // keys per copy in a tile that is cut
  // Pipeline stages of K, and of V: 96 KB in flight.
  static constexpr int kStages = kHeadDim <= 64 ? 6 : 3;
  static constexpr int kThreads = 128 + kWarpSize;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2, kTileBytes = kTileKeys * kHeadDim * 2;

  // Members that the plan and the merge require, as in DecodeShape.
  static constexpr bool kWholeTiles = true, kFloat = false;
  static constexpr int kMinRowWarps = 1, kMaxRowWarps = kRows / 16;
  static constexpr int kValueBucket = kHeadDim;
  static constexpr int kSumAt = kValueBucket, kRowMaxAt = kValueBucket + 1;
  static constexpr int kPartialRow = kValueBucket + 8;
  // Does not limit row warps: the launch takes sizeof(DecodeSm90Shared).
  static constexpr int shared_bytes(int, int) { return 0; }
};

// Template argument of plan_decode.
template <int kHeadDim>
struct DecodeSm90Keys {
  using Shape = DecodeSm90Shape<kHeadDim>;
  static constexpr int kBytes = 0;
};

// Calls visit.operator()<kHeadDim>() with the compiled head dimension.
template <typename Visit>
auto visit_decode_sm90_dim(int64_t head_dim, const Visit& visit) {
  return head_dim <= 64 ? visit.template operator()<64>() : visit.template operator()<128>();
}

// Compiled once for each element type (kernel_sm90.cu). Returns null, kNotMapped, or an error
// message.
template <typename T>
const char* launch_decode_sm90(const DecodeParams& d, cudaStream_t stream);

}  // namespace tokenmill::cuda
