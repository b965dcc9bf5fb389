// Tile sizes of the recurrence and its shared memory.
#pragma once
#include "cuda/arch/mma_sm80.cuh"
#include "cuda/load_tile.cuh"
#include "cuda/sequences.cuh"
#include "linear/feature_map.cuh"
#include "linear/linear_attention/recurrence.h"

namespace tokenmill::cuda::linear_attention {

constexpr int kColumnsPerWarp = 16;     // of values
constexpr int kSubtileColumns = 64;     // of a tile of values
constexpr int kTaylorDim = 32;          // largest head dimension of taylor2
constexpr int kMaxFeatures = 9 * 64;    // of taylor2 rounded up, more than any head dimension
constexpr int kTableBefore = 16;        // weights of keys behind the query, which nobody uses
constexpr int kNoFeature = kTaylorDim;  // index of the constant 1

// kBucket: the head dimension rounded up, or the features of a step of taylor2.
template <typename T, int kBucket, bool kTaylor_>
struct RecurrenceShape {
  static constexpr bool kFloat = sizeof(T) == 4;
  static constexpr bool kTaylor = kTaylor_;
  static constexpr int kTokens = kFloat ? 32 : 64;  // of a chunk
  static constexpr int kDim = kTaylor ? kTaylorDim : kBucket;
  // A step of features, whose state the accumulators hold; that of several lies in the workspace.
  static constexpr int kFeatures = kBucket <= 128 ? kBucket : kFloat ? 64 : 128;
  static constexpr bool kSteps = kTaylor || kFeatures < kBucket;
  // The others lack the registers for a part that hands on its state, see RecurrencePlan::chained.
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

  // Queries, keys, and one or two subtiles of values.
  __host__ __device__ static constexpr int stage_bytes(int warps) {
    return 2 * kRowBytes + warps * kColumnsPerWarp / kSubtileColumns * kValueBytes;
  }
  // Also values whose features are made.
  __host__ __device__ static constexpr int stage_bytes(int warps, bool value_taylor) {
    return stage_bytes(warps) + (value_taylor ? kValueBytes : 0);
  }
};

// Per block, in front of the tiles.
template <int kTokens>
struct alignas(128) SharedVectors {
  float table[kTokens + kTableBefore];  // weight of a key by distance, constant decays
  float start[kTokens];                 // of the state at the chunk's start in each token
  float end[kTokens];                   // of each token in the state at the chunk's end
  float high[kTokens], low[kTokens];    // log2 of decays from the chunk's start, two floats
  float sums[kMaxThreads];              // parts of the normaliser
  float inverse[kTokens];               // 1 / normaliser
  float extra[kTokens];                 // feature
  float total[4];                       // of the state from start to end of the chunk
  float normalizer[kMaxFeatures];       // its state
  uint8_t first[kMaxFeatures], second[kMaxFeatures];  // factors of the features of taylor2
};

// What the host chose for a launch.
struct RecurrencePlan {
  int warps, stages;
  int slices;                // of values
  int tokens_per_part;       // of a sequence that one block runs through, whole chunks
  int tail;                  // floats of a slot behind the state: normaliser or extra feature
  int64_t parts, all_parts;  // of a sequence (packed: 1), of all (packed: a bound)
  int64_t blocks;            // for parts, heads, slices; packed also for tokens without a sequence
  int64_t slot_floats;
  int64_t segments;  // of all sequences, a bound if packed

  int features;                    // rounded up
  int64_t q_step, k_step, v_step;  // TileLoader::step
  bool q_aligned, k_aligned, v_aligned, out_aligned;
  bool states_only;     // of the parts, into the workspace
  bool from_workspace;  // where parts but the first start
  bool chained;         // one launch, in which a part waits for the state of the one before it
  bool reverse;
  // Chained, zeros at first: the number of blocks that have begun, then whether a slot holds the
  // state at the end of its part.
  unsigned *begun, *arrived;
};

}  // namespace tokenmill::cuda::linear_attention
