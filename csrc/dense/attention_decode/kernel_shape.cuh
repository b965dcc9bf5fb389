// Tile shapes of the sm_80 decode kernel, and its work partition.
//
// An output tile is up to 16 kMaxRowWarps rows of one KV head of one request: row r is query r /
// group of head r % group. The keys that its rows see, in steps of kTileKeys, are cut into
// segments. A CTA takes one segment (split-KV), or all that fall into its share of the steps of all
// output tiles (stream-K).
#pragma once
#include "attention/float8_tile.cuh"
#include "attention/score_map.cuh"
#include "attention/score_mod.cuh"
#include "attention/tile_shape.cuh"
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/load_tile.cuh"
#include "dense/attention_decode/params.h"

namespace tokenmill::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;

// Head dimensions beyond 256: few keys per tile, so that two stages fit 99 KB.
template <typename T, int kBucket>
struct LatentTiles : TileShape<T, kBucket> {
  static constexpr int kTileKeys = sizeof(T) == 4 ? 8 : 16;
  static constexpr int kTileBytes = kTileKeys * TileShape<T, kBucket>::kRowBytes;
  static constexpr int kStageBytes = 2 * kTileBytes;
};
constexpr int kLatentBucket = 576;

template <typename T, int kBucket>
using DecodeTiles =
    std::conditional_t<(kBucket > 256), LatentTiles<T, kBucket>, TileShape<T, kBucket>>;

// A Float8 cache passes through two stages of codes, which are converted to one stage of T in turn.
template <typename T, int kBucket, typename Cache_ = T>
struct DecodeShape : DecodeTiles<T, kBucket> {
  using Cache = Cache_;
  using Tiles = DecodeTiles<T, kBucket>;
  using Tiles::kFloat, Tiles::kRowBytes, Tiles::kTileKeys, Tiles::kStageBytes;
  static constexpr int kStepKeys = kMmaDepth<T>;  // per warp
  static constexpr bool kFloat8 = std::is_same_v<Cache, Float8>;
  static constexpr bool kWholeTiles = false;                     // tiles start at the first key
  using Value = std::conditional_t<kFloat8, Float8Value<T>, T>;  // as P V takes it
  static constexpr bool kQueryInRegisters = kRowBytes <= 256;
  static constexpr bool kLatent = kBucket > 256;
  static constexpr int kValueBucket = kLatent ? 512 : kBucket;

  // Warps split the keys of a tile if there are few rows, and the rows if there are many. Two warps
  // split 256 columns of V, whose accumulators would take half of the registers of one; for latent
  // heads four warps split V, and the products of K with Q (multiply_shares).
  static constexpr int kColumnWarps = kBucket <= 128 ? 1 : kLatent ? kDecodeWarps : 2;
  static constexpr int kRowOrKeyWarps = kDecodeWarps / kColumnWarps;
  static constexpr int kMinRowWarps =
      kRowOrKeyWarps * kStepKeys <= kTileKeys ? 1 : kRowOrKeyWarps * kStepKeys / kTileKeys;
  static constexpr int kMaxRowWarps = kRowOrKeyWarps;

  // Row of partial sums: O, row_sum, row_max. The padding puts accumulator rows that are stored
  // together into different banks: two rows with four floats per lane (kFloat), or four with two.
  static constexpr int kSumAt = kValueBucket, kRowMaxAt = kValueBucket + 1;
  static constexpr int kPartialRow = kValueBucket + (kFloat ? 4 : 8);
  static constexpr int kPartialBytes =  // of all warps
      (kLatent ? 1 : kDecodeWarps) * 16 * kPartialRow * 4;

  // float32 sums over many keys have a second level.
  static constexpr int kChunkKeys = kFloat ? 1024 : 1 << 30;

  // Shared memory: stages, which partial sums reuse; state of the keys (key_bytes); Q.
  static constexpr int kCodeTileBytes = kTileKeys * kBucket;
  static constexpr int kStages = kLatent && kFloat && !kFloat8 ? 1 : 2;
  static constexpr int kStagesBytes =
      kFloat8 ? kStageBytes + 4 * kCodeTileBytes : kStages * kStageBytes;
  static constexpr int kWorkBytes = kStagesBytes > kPartialBytes ? kStagesBytes : kPartialBytes;
  static constexpr int kExchangeBytes =
      kLatent ? kDecodeWarps * kWarpSize * kStepKeys / 8 * 16 : 0;  // for multiply_shares
  static constexpr int shared_bytes(int key_bytes, int row_warps) {
    return kWorkBytes + key_bytes + row_warps * 16 * kRowBytes + kExchangeBytes;
  }
};

// Launch plan, made on the host.
struct DecodePlan {
  int log2_row_warps;
  int group;        // query heads per KV head
  int rows;         // rows per KV head: group * Sq
  int row_tiles;    // output tiles per KV head
  int tile_rows;    // 16 << log2_row_warps
  int splits;       // per output tile; 0: stream-K
  bool aligned;     // rows of q, k and v are whole 16-byte chunks
  float* partials;  // [slots][tile_rows][kPartialRow]
  int* arrived;     // finished segments per output tile
};

// A range of keys of an output tile.
struct Segment {
  int b, h, row_tile;
  int begin, end;               // keys
  int part, parts;              // index and number of segments of the output tile
  int64_t output, first_block;  // index of the output tile; CTA of part 0
};

// Minimum number of steps that is worth a CTA.
template <typename Shape>
constexpr int kMinSteps = 256 / Shape::kTileKeys;

// Keys of an output tile of request b. kWholeTiles: from a multiple of kTileKeys on.
template <typename Shape>
__device__ __forceinline__ KeyRange keys_of(const DecodeParams& d, int b) {
  const AttentionParams& p = d.attention;
  KeyRange keys = KeyRange::of(decode_band(p, p.seqlen_q, d.cache.length(b)));
  if constexpr (Shape::kWholeTiles) keys.begin -= keys.begin % Shape::kTileKeys;
  return keys;
}

// Steps of an output tile of request b: at least one, which stores the result of a request without
// keys.
template <typename Shape>
__device__ __forceinline__ int steps_of(const DecodeParams& d, int b) {
  const KeyRange keys = keys_of<Shape>(d, b);
  const int count = static_cast<int>(keys.end - keys.begin);
  return count > 0 ? (count + Shape::kTileKeys - 1) / Shape::kTileKeys : 1;
}

// Tile scheduler: the segments of a CTA, in order. Called by all lanes of a warp.
template <typename Shape>
class Segments {
 public:
  __device__ Segments(const DecodeParams& d, const DecodePlan& plan)
      : d_(d), plan_(plan), tiles_(static_cast<int>(d.attention.kv_heads) * plan.row_tiles) {
    if (plan.splits > 0) {
      const int64_t output = blockIdx.x / plan.splits;
      b_ = static_cast<int>(output / tiles_);
      steps_ = steps_of<Shape>(d, b_);
      before_ = b_ * int64_t{tiles_} * steps_;  // as if all earlier requests were like this one
      const int parts = min(plan.splits, steps_), part = blockIdx.x % plan.splits;
      const int64_t first = output * steps_;
      next_ = first + int64_t{part} * steps_ / parts;
      end_ = part < parts ? first + int64_t{part + 1} * steps_ / parts : next_;
      return;
    }
    const int lane = threadIdx.x % kWarpSize;
    int64_t total = 0;
    for (int64_t b = lane; b < d.attention.batch; b += kWarpSize)
      total += steps_of<Shape>(d, static_cast<int>(b));
    total_ = warp_sum(total) * tiles_;
    const int64_t worth = (total_ + kMinSteps<Shape> - 1) / kMinSteps<Shape>;
    blocks_ = worth < gridDim.x ? worth : gridDim.x;
    if (blockIdx.x >= blocks_) return;
    next_ = blockIdx.x * total_ / blocks_;
    end_ = (blockIdx.x + 1) * total_ / blocks_;
    find_request();
  }

  __device__ __forceinline__ bool take(Segment& s) {
    if (next_ >= end_) return false;
    while (next_ >= before_ + int64_t{tiles_} * steps_) {
      before_ += int64_t{tiles_} * steps_;
      steps_ = steps_of<Shape>(d_, ++b_);
    }
    const int64_t in_request = next_ - before_;
    const int tile = static_cast<int>(in_request / steps_);
    const int64_t first = before_ + int64_t{tile} * steps_;  // first step of the output tile
    const int step = static_cast<int>(next_ - first);
    const int count = static_cast<int>(end_ - next_ < steps_ - step ? end_ - next_ : steps_ - step);
    s.b = b_;
    s.h = tile / plan_.row_tiles;
    s.row_tile = tile % plan_.row_tiles;
    s.output = b_ * int64_t{tiles_} + tile;
    if (plan_.splits > 0) {
      s.first_block = s.output * plan_.splits;
      s.parts = min(plan_.splits, steps_);
    } else {
      s.first_block = block_of(first);
      s.parts = static_cast<int>(block_of(first + steps_ - 1) - s.first_block) + 1;
    }
    s.part = static_cast<int>(blockIdx.x - s.first_block);
    const KeyRange keys = keys_of<Shape>(d_, b_);
    const KeyRange own = keys.part(step, step + count, Shape::kTileKeys);
    s.begin = static_cast<int>(own.begin);
    s.end = static_cast<int>(own.end);
    next_ += count;
    return true;
  }

 private:
  // Finds the request that contains step next_.
  __device__ void find_request() {
    const int lane = threadIdx.x % kWarpSize;
    before_ = 0;
    for (int64_t first = 0;; first += kWarpSize) {
      const int64_t b = first + lane;
      const int own = b < d_.attention.batch ? steps_of<Shape>(d_, static_cast<int>(b)) : 0;
      int64_t end = int64_t{own} * tiles_;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int64_t other = __shfl_up_sync(kFullWarp, end, offset);
        if (lane >= offset) end += other;
      }
      const unsigned found = __ballot_sync(kFullWarp, next_ < before_ + end);
      if (found) {
        const int owner = __clz(__brev(found));  // the lowest bit
        b_ = static_cast<int>(first) + owner;
        steps_ = __shfl_sync(kFullWarp, own, owner);
        before_ += __shfl_sync(kFullWarp, end, owner) - int64_t{steps_} * tiles_;
        return;
      }
      before_ += __shfl_sync(kFullWarp, end, kWarpSize - 1);
    }
  }

  // CTA that takes `step`: CTA i takes steps [i total_ / blocks_, (i + 1) total_ / blocks_).
  __device__ int64_t block_of(int64_t step) const { return ((step + 1) * blocks_ - 1) / total_; }

  const DecodeParams& d_;
  const DecodePlan& plan_;
  int tiles_;  // output tiles per request
  int b_ = 0, steps_ = 1;
  int64_t before_ = 0, next_ = 0, end_ = 0;  // in steps: all earlier requests; own range
  int64_t total_ = 0, blocks_ = 0;
};

}  // namespace tokenmill::cuda
