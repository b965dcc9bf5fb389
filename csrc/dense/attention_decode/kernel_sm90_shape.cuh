// Tiles of the decode kernel on compute capability 9.0a, and what its parts share.
//
// All rows of a KV head of a request are one output tile, of 64 rows at most; its keys are cut into
// segments and these given to blocks as in kernel_shape.cuh.
#pragma once
#include "cuda/arch/sm90/mbarrier.cuh"
#include "cuda/arch/sm90/tensor_map.h"
#include "cuda/attention/weights_sm90.cuh"
#include "dense/attention_decode/launch_sm90.h"

namespace tokenmill::cuda {

// What the host chose for a launch.
struct DecodeSm90Plan : DecodePlan {
  CUtensorMap k, v, k_part, v_part;  // of whole tiles, and of kPartKeys keys
  Sm90Scores scores;
};

// Shared memory of a block. A barrier `full` ends its phase when the copies into its tile are done,
// `empty` when all warps that multiply are done with the tile; so for what is known of a segment.
template <typename Shape>
struct alignas(1024) DecodeSm90Shared {
  char q[Shape::kQueryBytes];
  char k[Shape::kStages][Shape::kTileBytes];
  char v[Shape::kStages][Shape::kTileBytes];
  Mbarrier k_full[Shape::kStages], k_empty[Shape::kStages];
  Mbarrier v_full[Shape::kStages], v_empty[Shape::kStages];
  Mbarrier segment_full[2], segment_empty[2];
  Segment segments[2];
  int is_last;  // of those that are done with an output tile

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
