// Which calls with few rows compute capability 9.0a has a decode kernel for, its tiles, and its
// launch.
#pragma once
#include "dense/attention/launch_sm90.h"
#include "dense/attention_decode/kernel_shape.cuh"

namespace tokenmill::cuda {

// A block is a warpgroup that multiplies and a warp that loads; two blocks share a multiprocessor.
template <int kHeadDim_>
struct DecodeSm90Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = 64;
  static constexpr int kTileKeys = 64;  // of a page
  static constexpr int kPartKeys = 16;  // copied at once of a tile that ends
  // Of keys, and of values: 96 KB that may be on their way.
  static constexpr int kStages = kHeadDim <= 64 ? 6 : 3;
  static constexpr int kThreads = 128 + kWarpSize;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2, kTileBytes = kTileKeys * kHeadDim * 2;

  // What the plan and the merge ask, as in DecodeShape.
  static constexpr bool kWholeTiles = true, kFloat = false;
  static constexpr int kMinRowWarps = 1, kMaxRowWarps = kRows / 16;
  static constexpr int kValueBucket = kHeadDim;
  static constexpr int kSumAt = kValueBucket, kRowMaxAt = kValueBucket + 1;
  static constexpr int kPartialRow = kValueBucket + 8;
  // Nothing that limits row warps: the launch takes sizeof(DecodeSm90Shared).
  static constexpr int shared_bytes(int, int) { return 0; }
};

// For plan_decode.
template <int kHeadDim>
struct DecodeSm90Keys {
  using Shape = DecodeSm90Shape<kHeadDim>;
  static constexpr int kBytes = 0;
};

// visit.operator()<kHeadDim>()
template <typename Visit>
auto visit_decode_sm90_dim(int64_t head_dim, const Visit& visit) {
  return head_dim <= 64 ? visit.template operator()<64>() : visit.template operator()<128>();
}

// The rules of python/tokenmill/dense/attention_kernels.py, of requests with as many queries each
// that see no key behind them.
inline bool takes_decode_sm90(const DecodeParams& d) {
  const AttentionParams& p = d.attention;
  if (!has_sm90_form(p) || !has_sm90_scale(p) || d.cache.dtype != p.dtype) return false;
  if (p.head_dim != 64 && p.head_dim != 128) return false;
  if (p.heads / p.kv_heads * p.seqlen_q > DecodeSm90Shape<64>::kRows) return false;
  if (d.cache.block_table && page_size(d.cache) < kLeastSm90Page) return false;
  return Sm90Tensors(p, d.cache).can_be_mapped();
}

// Defined in a generated source for each element type. null, kNotMapped, or what went wrong.
template <typename T>
const char* launch_decode_sm90(const DecodeParams& d, cudaStream_t stream);

}  // namespace tokenmill::cuda
