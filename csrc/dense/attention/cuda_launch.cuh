// Chooses blocks for the forward and launches one instance of its kernel.
#pragma once
#include "cuda/launch.cuh"
#include "dense/attention/kernel.cuh"

namespace tokenmill::cuda {

// Blocks from which on larger ones, which read keys and values less often, still fill a GPU.
constexpr int64_t kManyBlocks = 256;

template <typename Shape>
ForwardPlan plan_forward(const AttentionParams& p) {
  const int64_t group = p.heads / p.kv_heads, sequences = p.cu_seqlens_q ? 1 : p.batch;
  const auto tiles = [&](int64_t rows) {
    return max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, rows);
  };
  ForwardPlan plan{};
  int log2_heads = 0;
  while (log2_heads < 3 && 1 << log2_heads < group) ++log2_heads;
  const bool many = tiles(8 * Shape::kWarpRows) * p.heads * sequences >= kManyBlocks;
  const int log2_warps = log2_heads > 0 || many ? 3 : 2;
  plan.warps = 1 << log2_warps;
  plan.log2_warps_per_head = log2_warps - log2_heads;
  plan.tiles = static_cast<unsigned>(tiles(Shape::kWarpRows << plan.log2_warps_per_head));
  plan.blocks_per_group = static_cast<unsigned>(ceil_div(group, 1 << log2_heads));
  plan.head_blocks = static_cast<unsigned>(p.kv_heads) * plan.blocks_per_group;
  return plan;
}

template <typename T, int kBucket, Weights kWeights, bool kGeneral>
const char* launch_forward(const AttentionParams& p, const MaskBounds& bounds,
                           cudaStream_t stream) {
  using Shape = ForwardShape<T, kBucket>;
  ForwardPlan plan = plan_forward<Shape>(p);
  plan.bounds = bounds;
  plan.inputs_aligned = is_vectorizable<T>(p.q.data, p.head_dim, p.q.batch, p.q.seq, p.q.head) &&
                        is_vectorizable<T>(p.k.data, p.head_dim, p.k.batch, p.k.seq, p.k.head) &&
                        is_vectorizable<T>(p.v.data, p.value_dim, p.v.batch, p.v.seq, p.v.head);
  plan.output_aligned =
      is_vectorizable<T>(p.out.data, p.value_dim, p.out.batch, p.out.seq, p.out.head);
  using Keys = TileLoader<T, typename Shape::KeyTile, Shape::kTileKeys>;
  plan.inputs_whole = plan.inputs_aligned && p.head_dim == kBucket && p.value_dim == kBucket;
  plan.key_step = Keys::step(p.k.seq, plan.warps * kWarpSize);
  plan.value_step = Keys::step(p.v.seq, plan.warps * kWarpSize);
  plan.factor = ForwardWarp<T, kBucket, kWeights, kGeneral>::factor(p);
  const int staged = plan.warps * Shape::kWarpRows * Shape::kRowBytes;
  const int bytes = kParkedBytes<kGeneral> +
                    (Shape::kFloat || staged < Shape::kSharedBytes ? Shape::kSharedBytes : staged);
  if (plan.tiles == 0) return nullptr;
  const int64_t at_once = kMaxGrid / plan.tiles;
  const int64_t head_blocks = plan.head_blocks * (p.cu_seqlens_q ? 1 : p.batch);
  for (int64_t first = 0; first < head_blocks; first += at_once) {
    plan.first_head_block = static_cast<unsigned>(first);
    const int64_t count = head_blocks - first < at_once ? head_blocks - first : at_once;
    if (const char* error = launch<attention_forward_kernel<T, kBucket, kWeights, kGeneral>>(
            count * plan.tiles, plan.warps * kWarpSize, bytes, stream, p, plan))
      return error;
  }
  return nullptr;
}

// Defined in cuda_<dtype>.cu each.
template <typename T>
const char* launch_forward(const AttentionParams& p, const MaskBounds& bounds, cudaStream_t stream);

template <typename T, int kBucket>
const char* launch_bucket(const AttentionParams& p, const MaskBounds& bounds, cudaStream_t stream) {
  if (needs_general(p)) return launch_forward<T, kBucket, Weights::any, true>(p, bounds, stream);
  if constexpr (sizeof(T) == 4) {
    return launch_forward<T, kBucket, Weights::any, false>(p, bounds, stream);
  } else {
    switch (weights_of(p)) {
      case Weights::softmax:
        return launch_forward<T, kBucket, Weights::softmax, false>(p, bounds, stream);
      case Weights::sigmoid:
        return launch_forward<T, kBucket, Weights::sigmoid, false>(p, bounds, stream);
      case Weights::fast_sigmoid:
        return launch_forward<T, kBucket, Weights::fast_sigmoid, false>(p, bounds, stream);
      default:
        return launch_forward<T, kBucket, Weights::elementwise, false>(p, bounds, stream);
    }
  }
}

template <typename T>
const char* launch_forward(const AttentionParams& p, const MaskBounds& bounds,
                           cudaStream_t stream) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 32) return launch_bucket<T, 32>(p, bounds, stream);
  if (dim <= 64) return launch_bucket<T, 64>(p, bounds, stream);
  if (dim <= 96) return launch_bucket<T, 96>(p, bounds, stream);
  if (dim <= 128) return launch_bucket<T, 128>(p, bounds, stream);
  if (dim <= 192) return launch_bucket<T, 192>(p, bounds, stream);
  return launch_bucket<T, 256>(p, bounds, stream);
}

}  // namespace tokenmill::cuda
