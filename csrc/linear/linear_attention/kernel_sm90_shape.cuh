// Tile shapes and shared memory of the sm_90a recurrence.
#pragma once
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/arch/sm90/warpgroup.cuh"
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// A CTA is a producer warpgroup, a consumer warpgroup that computes W, and kWarpgroups consumer
// warpgroups that keep the state.
template <int kHeadDim_>
struct Sm90Shape {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTokens = 64;  // per chunk
  static constexpr int kWarpgroups = 2;
  static constexpr int kColumns = 64;  // columns of V per warpgroup
  static constexpr int kBlockColumns = kWarpgroups * kColumns;
  static constexpr int kStages = kHeadDim <= 128 ? 3 : 2;  // chunks in shared memory
  static constexpr int kThreads = (2 + kWarpgroups) * kWarpgroupThreads;
  // 64 Ki registers are 128 per thread at launch. The state takes kHeadDim / 2.
  static constexpr int kLoadRegisters = kHeadDim <= 128 ? 40 : 32;
  static constexpr int kWeighRegisters = kHeadDim <= 128 ? 72 : 64;
  static constexpr int kStateRegisters = kHeadDim <= 128 ? 200 : 208;

  // Interface of ValueFragments and add_infinite; layout of tma.cuh.
  static constexpr bool kFloat = false;
  static constexpr int kDepth = kMmaDepth<__half>;
  using ValueTile = SharedTile<kBoxRowBytes, Swizzle::plain>;
  using WeightTile = ValueTile;

  static constexpr int kRowBytes = kTokens * kHeadDim * 2;  // queries or keys
  static constexpr int kBlockBytes = kTokens * kBoxRowBytes;
};

struct Sm90WeightStages {
  static constexpr int kStages = 2;
};

// Decays of a chunk, see SharedVectors.
struct ChunkDecays {
  float start[64], end[64], high[64], low[64], total[4];
};

// Shared memory of a CTA. Barriers of a stage: `full` completes when the copies have landed,
// `ready` when decays are computed and rows past the sequence are zeroed, `empty` when all consumer
// warps have released the stage.
template <typename Shape>
struct alignas(1024) Sm90Shared {
  static constexpr int kWeightStages = Sm90WeightStages::kStages;

  char q[Shape::kStages][Shape::kRowBytes];
  char k[Shape::kStages][Shape::kRowBytes];
  char v[Shape::kStages][Shape::kWarpgroups][Shape::kBlockBytes];
  char weights[kWeightStages][Shape::kBlockBytes];  // [query][key]
  char out[Shape::kWarpgroups][Shape::kBlockBytes];
  ChunkDecays decays[Shape::kStages];
  Mbarrier full[Shape::kStages], ready[Shape::kStages], empty[Shape::kStages];
  Mbarrier weights_full[kWeightStages], weights_empty[kWeightStages];

  __device__ void init_barriers(bool weighs) {
    constexpr int kWarps = kWarpgroupThreads / kWarpSize;  // per warpgroup
    for (int i = 0; i < Shape::kStages; ++i) {
      full[i].init(1), ready[i].init(1);
      empty[i].init((Shape::kWarpgroups + weighs) * kWarps);
    }
    for (int i = 0; i < kWeightStages; ++i) {
      weights_full[i].init(kWarps);
      weights_empty[i].init(Shape::kWarpgroups * kWarps);
    }
    publish_mbarriers();
  }
};

struct Sm90Plan {
  RecurrencePlan parts;
  CUtensorMap q, k, v, out;  // q and out: unless parts.states_only
};

}  // namespace tokenmill::cuda::linear_attention
