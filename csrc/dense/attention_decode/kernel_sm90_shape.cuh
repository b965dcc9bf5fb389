// Launch plan and shared memory of the sm_90a decode kernel.
//
// All query rows of a KV head of a request are one output tile of at most 64 rows; its keys are cut
// into segments, which are assigned to CTAs as in kernel_shape.cuh.
#pragma once
#include "attention/score_map_sm90.cuh"
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "dense/attention_decode/launch_sm90.h"

namespace tokenmill::cuda {

// Launch plan, made on the host.
struct DecodeSm90Plan : DecodePlan {
  CUtensorMap k, v, k_part, v_part;  // boxes of whole tiles, and of kPartKeys keys
  Sm90Scores scores;
};

// Shared memory of a CTA. A `full` mbarrier completes its phase when the TMA copies into its tile
// have landed, an `empty` one when all consumer warps have released the tile; segments are passed
// in the same way.
template <typename Shape>
struct alignas(1024) DecodeSm90Shared {
  char q[Shape::kQueryBytes];
  char k[Shape::kStages][Shape::kTileBytes];
  char v[Shape::kStages][Shape::kTileBytes];
  Mbarrier k_full[Shape::kStages], k_empty[Shape::kStages];
  Mbarrier v_full[Shape::kStages], v_empty[Shape::kStages];
  Mbarrier segment_full[2], segment_empty[2];
  Segment segments[2];
  int is_last;  // this CTA finishes an output tile last

  // Memory for values of a cut tile made finite: its K stage.
  static constexpr bool kFiniteInKeys = true;
  static constexpr int kFiniteKeys = Shape::kTileKeys;
  __device__ char* finite_values(int, int stage) { return k[stage]; }

  __device__ void init_barriers() {
    constexpr int kWarps = Shape::kRows / 16;
    for (int i = 0; i < Shape::kStages; ++i) {
      k_full[i].init(1), k_empty[i].init(kWarps);
      v_full[i].init(1), v_empty[i].init(kWarps);
    }
    for (int i = 0; i < 2; ++i) segment_full[i].init(1), segment_empty[i].init(kWarps);
    publish_mbarriers();
  }
};

}  // namespace tokenmill::cuda
