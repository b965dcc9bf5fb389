// Tile sizes of the recurrence and its shared memory layout.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/sequences.cuh"
#include "linear/feature_map.cuh"
#include "linear/linear_attention/recurrence.h"

namespace tokenmill::cuda::linear_attention {

constexpr int kColumnsPerWarp = 16;   // columns of V per warp
constexpr int kSubtileColumns = 64;   // columns of V per subtile
constexpr int kTaylorDim = 32;        // maximum head_dim of taylor2
constexpr int kMaxFeatures = 9 * 64;  // features of taylor2 rounded up; larger than any head_dim
// table entries for keys after the query, whose weights are never used
constexpr int kTableBefore = 16;
constexpr int kNoFeature = kTaylorDim;  // index of the constant 1

// kBucket: head_dim rounded up, or the features per step of taylor2.
template <typename T, int kBucket, bool kTaylor_>
struct RecurrenceShape {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr bool kTaylor = kTaylor_;
  static constexpr int kTokens = kFloat ? 32 : 64;  // per chunk
  static constexpr int kDim = kTaylor ? kTaylorDim : kBucket;
  // Features per step, whose state fits in the accumulators. With several steps the state is kept
  // in the workspace.
  static constexpr int kFeatures = kBucket <= 128 ? kBucket : kFloat ? 64 : 128;
  static constexpr bool kSteps = kTaylor || kFeatures < kBucket;
  // Other shapes lack the registers to hand on the state of a part, see RecurrencePlan::chained.
  static constexpr bool kChains = !kSteps && (!kFloat || kBucket <= 64);
  static constexpr int kFeatureTiles = kFeatures / 8;
  static constexpr int kFeatureChunks = kFeatures * static_cast<int>(sizeof(T)) / kChunkBytes;
  static constexpr int kDepth = kMmaDepth<T>;

  template <int kColumns>
  using Tile = SharedTile<static_cast<int>(sizeof(T)) * kColumns, Swizzle::quad>;
  using RowTile = Tile<kDim>;
  using FeatureTile = Tile<kTaylor ? kFeatures : kDim>;
  using ValueTile = Tile<kSubtileColumns>;
  using WeightTile = Tile<kTokens>;

  static constexpr int kRowBytes = kTokens * RowTile::kRowBytes;
  static constexpr int kFeatureBytes = kTokens * FeatureTile::kRowBytes;
  static constexpr int kValueBytes = kTokens * ValueTile::kRowBytes;
  static constexpr int kWeightBytes = kTokens * WeightTile::kRowBytes;

  // One pipeline stage: queries, keys, and one or two subtiles of values.
  __host__ __device__ static constexpr int stage_bytes(int warps) {
    return 2 * kRowBytes + warps * kColumnsPerWarp / kSubtileColumns * kValueBytes;
  }
  // With value_taylor, also raw values from which features are computed.
  __host__ __device__ static constexpr int stage_bytes(int warps, bool value_taylor) {
    return stage_bytes(warps) + (value_taylor ? kValueBytes : 0);
  }
};

// Per-CTA vectors, placed before the tiles.
template <int kTokens>
struct alignas(128) SharedVectors {
  float table[kTokens + kTableBefore];  // weight of a key by distance, constant decays
  float start[kTokens];                 // weight of the chunk's initial state, per token
  float end[kTokens];                   // weight of each token in the state at the chunk's end
  float high[kTokens], low[kTokens];  // cumulative log2 decay from the chunk's start, as two floats
  float sums[kMaxThreads];            // partial sums of the normalizer
  float inverse[kTokens];             // 1 / normalizer
  float extra[kTokens];               // the extra feature, per token
  float total[4];                     // decay of the state over the chunk
  float normalizer[kMaxFeatures];     // state of the normalizer
  uint8_t first[kMaxFeatures], second[kMaxFeatures];  // factor indices of the taylor2 features
};

// Launch parameters chosen by the host.
struct RecurrencePlan {
  int warps, stages;
  int slices;                // slices of the columns of V
  int tokens_per_part;       // tokens of a sequence per CTA, a multiple of the chunk size
  int tail;                  // floats of a slot after the state: normalizer or extra feature
  int64_t parts, all_parts;  // parts per sequence (packed: 1), parts in total (packed: a bound)
  // CTAs: parts x heads x slices; if packed, also for tokens outside of every sequence
  int64_t blocks;
  int64_t slot_floats;
  int64_t segments;  // total over all sequences, a bound if packed

  int features;                    // rounded up
  int64_t q_step, k_step, v_step;  // see TileLoader::step
  bool q_aligned, k_aligned, v_aligned, out_aligned;
  bool states_only;     // computes only the states of the parts, into the workspace
  bool from_workspace;  // parts after the first start from a state in the workspace
  bool chained;         // single launch in which each part waits for the state of the previous part
  bool reverse;
  // Chained, initially zero: number of CTAs that have started; flag per slot, set once it holds the
  // state at the end of its part.
  unsigned *begun, *arrived;
};

}  // namespace tokenmill::cuda::linear_attention
