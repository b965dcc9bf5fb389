// Forward. A block owns rows of queries of one KV head, a warp 16 or 32 rows of one query head; the
// tiles of keys and values that any row sees stream through two stages of shared memory. The warps
// of a block are split among the query heads of a group, which share those tiles.
#pragma once
#include "dense/attention/kernel_store.cuh"

namespace tokenmill::cuda {

// What the host chose for a launch: blockIdx.x counts tiles of positions, then blocks of heads of
// all sequences.
struct ForwardPlan {
  int warps;
  int log2_warps_per_head;    // a warp owns other positions, or another head of the group
  unsigned tiles;             // of a head; packed: of all sequences
  unsigned head_blocks;       // of a sequence
  unsigned blocks_per_group;  // blocks of heads for one KV head
  unsigned first_head_block;
  int64_t key_step, value_step;  // TileLoader::step
  float factor;                  // ForwardWarp::factor
  bool inputs_aligned, output_aligned;
  bool inputs_whole;  // aligned, and rows of keys and values fill those of their tiles
};

template <typename T, int kBucket, Weights kWeights, bool kGeneral>
__global__ void __launch_bounds__(kMaxThreads)
    attention_forward_kernel(const __grid_constant__ AttentionParams p,
                             const __grid_constant__ ForwardPlan plan) {
  using Shape = ForwardShape<T, kBucket>;
  using Keys = TileLoader<T, typename Shape::KeyTile, Shape::kTileKeys>;
  using Values = TileLoader<T, typename Shape::ValueTile, Shape::kTileKeys>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);

  const int warp_index = __shfl_sync(kFullWarp, threadIdx.x / kWarpSize, 0);
  const int block_rows = Shape::kWarpRows << plan.log2_warps_per_head;
  const unsigned head_block = plan.first_head_block + blockIdx.x / plan.tiles;
  const unsigned in_sequence = head_block % plan.head_blocks;
  TilePlace place{static_cast<int>(head_block / plan.head_blocks),
                  static_cast<int>(blockIdx.x % plan.tiles)};
  if (p.cu_seqlens_q)
    place = find_tile(p.cu_seqlens_q, p.batch, p.seqlen_q, block_rows, place.tile);
  if (place.b < 0) return;
  const Sequence s = sequence_of(p, place.b);
  // The last queries see most keys under a causal mask: longest blocks first.
  const int first_row = ((s.q_length + block_rows - 1) / block_rows - 1 - place.tile) * block_rows;
  const int last_row = min(first_row + block_rows, s.q_length) - 1;

  const int kv_head = in_sequence / plan.blocks_per_group;
  const int group = static_cast<int>(p.heads) / static_cast<int>(p.kv_heads);
  const int heads_per_block = plan.warps >> plan.log2_warps_per_head;
  const int in_group = in_sequence % plan.blocks_per_group * heads_per_block +
                       (warp_index >> plan.log2_warps_per_head);
  const bool idle = in_group >= group;
  const int h = kv_head * group + (idle ? 0 : in_group);

  const WarpBand band(p, s);
  const GlobalRows<T> queries{rows_at<T>(p.q, place.b, s.q_start, h), p.q.seq, s.q_length,
                              static_cast<int>(p.head_dim), plan.inputs_aligned};
  const GlobalRows<T> keys{rows_at<T>(p.k, place.b, s.k_start, kv_head), p.k.seq, s.k_length,
                           static_cast<int>(p.head_dim), plan.inputs_aligned};
  const GlobalRows<T> values{rows_at<T>(p.v, place.b, s.k_start, kv_head), p.v.seq, s.k_length,
                             static_cast<int>(p.value_dim), plan.inputs_aligned};

  const int begin = band.begin(first_row) / Shape::kTileKeys * Shape::kTileKeys;
  const int end = band.end(last_row);
  uint32_t key_offset = Keys::own_offset();
  keep(key_offset);
  uint32_t value_offset = key_offset;
  if constexpr (!std::is_same_v<Keys, Values>) value_offset = Values::own_offset();
  Keys load_keys(keys, begin, plan.key_step, key_offset);
  Values load_values(values, begin, plan.value_step, value_offset);
  int whole_end = plan.inputs_whole ? s.k_length : 0;
  if constexpr (kBucket <= 64) keep(whole_end);
  const auto load_stage = [&](uint32_t stage, int key0) {
    if (key0 + Shape::kTileKeys <= whole_end) {
      if (blockDim.x == kMaxThreads) {
        load_keys.template load_whole<kMaxThreads>(stage);
        load_values.template load_whole<kMaxThreads>(stage + Shape::kTileBytes);
      } else {
        load_keys.template load_whole<kMaxThreads / 2>(stage);
        load_values.template load_whole<kMaxThreads / 2>(stage + Shape::kTileBytes);
      }
    } else {
      load_keys.load(stage, key0);
      load_values.load(stage + Shape::kTileBytes, key0);
    }
    commit_copies();
  };
  if (begin < end) load_stage(stages, begin);

  const int position = warp_index & ((1 << plan.log2_warps_per_head) - 1);
  const int first = idle ? s.q_length : first_row + position * Shape::kWarpRows;
  ForwardWarp<T, kBucket, kWeights, kGeneral> warp(p, s, band, place.b, h, first, queries,
                                                   plan.factor);
  WarpOutput<T, kBucket, kWeights, kGeneral> output(warp);
  const auto output_rows = [&] {
    return OutputRows<T>{rows_at<T>(p.out, place.b, s.q_start, h), p.out.seq,
                         static_cast<int>(p.value_dim), plan.output_aligned};
  };

  StageAddresses<Shape> at(stages);
  int other = Shape::kStageBytes;  // from the stage at hand to the other one
  uint32_t next = stages + other;
#pragma unroll 1
  for (int key0 = begin; key0 < end; key0 += Shape::kTileKeys) {
    wait_for_copies<0>();
    __syncthreads();
    if (key0 + Shape::kTileKeys < end) load_stage(next, key0 + Shape::kTileKeys);
    warp.add_tile(at, key0);
    at.move(other);
    other = -other;
    next += other;
    if constexpr (Shape::kFloat)
      if ((key0 + Shape::kTileKeys - begin) % output.kFlushKeys == 0) output.flush(output_rows());
  }
  __syncthreads();
  if (first <= warp.last_) {
    float* lse = p.lse ? lse_at(p, p.lse, place.b, s.q_start, h) : nullptr;
    output.store(output_rows(), lse, p.sink ? p.sink + h : nullptr,
                 stages + warp_index * Shape::kWarpRows * Shape::kRowBytes);
  }
}

}  // namespace tokenmill::cuda
