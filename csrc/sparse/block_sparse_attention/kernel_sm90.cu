// sm_90a forward, for the calls that takes_sm90 accepts.
//
//   S = Q K^T    P = 2^(factor S - row_max)    O = P V
//
// A CTA has up to three consumer warpgroups, each with a unit of 64 query rows; the units share one
// list. A producer warp iterates over the keys that any unit sees (sink keys, listed blocks, recent
// keys) in tiles of 64. It loads Q once and K and V per tile, and publishes with each K tile its
// key range and mask. A consumer warpgroup keeps S, P and O in registers. On unmasked tiles, Q K^T
// of one tile and P V of the previous one overlap with the softmax.
#include "attention/epilogue_sm90.cuh"
#include "attention/masked_values_sm90.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_sm90_loader.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// Consumer warpgroup: computes one unit.
template <typename T, typename Shape>
class Consumer {
 public:
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  using Shared = Sm90Shared<Shape>;
  using Scores = Sm90ScoreMap<T, Weights::softmax>;

  __device__ Consumer(const Sm90Launch& d, Shared& shared, int warpgroup)
      : d_(d), shared_(shared), rows_(shared.rows(warpgroup)), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
    {
      const TileNumber number = TileNumber::of(d_);
      const RequestBlock block = RequestBlock::of(d_, number.b, number.block);
      const Sm90Unit unit = Sm90Unit::of(d_, number, block, warpgroup_);
      exists_ = unit.queries > 0;
      first_ = unit.first_query + block.diagonal;
    }
#pragma unroll
    for (int j = 0; j < kHeadDim / 2; ++j) o_[j] = 0;
    Scores weights(d_.scores, 0);
    shared_.q_full.wait(0);
#pragma unroll 1
    for (TileMask tile = await_keys(number_); tile.end >= 0;) {
      if (!exists_ || !tile.any<kRows>(first_)) {
        skip_tile();
        tile = await_keys(number_);
      } else if (tile.all<kRows>(first_)) {
        tile = mainloop_unmasked(weights);
      } else {
        masked_tile(tile, weights);
        tile = await_keys(number_);
      }
    }
    if (exists_) store(weights);
  }

 private:
  // Waits for K tile `number` and returns its mask.
  __device__ __forceinline__ TileMask await_keys(unsigned number) const {
    const Stage<Shape> stage(number);
    shared_.k_full[stage.index].wait(stage.parity);
    return shared_.visibility[stage.index];
  }

  __device__ __forceinline__ void skip_tile() {
    const Stage<Shape> stage(number_);
    release(shared_.k_empty[stage.index]);
    shared_.v_full[stage.index].wait(stage.parity);
    release(shared_.v_empty[stage.index]);
    ++number_;
  }

  // Processes unmasked tiles from the current one on, with S = Q K^T of the next tile in flight
  // during the softmax. Returns the mask of the first tile after them.
  __device__ __forceinline__ TileMask mainloop_unmasked(Scores& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    // S = Q K^T
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    // online softmax: update row_max, rescale row_sum and O
    weights.apply_map(s);
    weights.rescale(o_);
    pack_weights(p, s, weights);
    TileMask next;
#pragma unroll 1
    for (next = await_keys(number_ + 1); next.all<kRows>(first_); next = await_keys(number_ + 1)) {
      // S = Q K^T of the next tile, O += P V of this one
      multiply_keys(s, number_ + 1);
      multiply_values(p, number_);
      finish_keys<1>(s, number_ + 1);
      weights.apply_map(s);
      finish_values(number_);
      weights.rescale(o_);
      pack_weights(p, s, weights);
      ++number_;
    }
    // O += P V of the last unmasked tile
    multiply_values(p, number_);
    finish_values(number_);
    ++number_;
    return next;
  }

  // Processes one tile that is cut by a mask or by the end of the keys.
  __device__ __forceinline__ void masked_tile(const TileMask& tile, Scores& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    const int last = first_ + kRows - 1;
    const int seen_begin = max(tile.begin, last + tile.low);
    const int seen_end = min(tile.end, first_ + tile.high);
    tile.bounds(first_, 2 * static_cast<int>(threadIdx.x % 4))
        .hide(s, seen_begin > 0, seen_end < kKeys);
    weights.apply_map(s);
    weights.rescale(o_);
    pack_weights(p, s, weights);
    const Stage<Shape> stage(number_);
    shared_.v_full[stage.index].wait(stage.parity);
    const uint32_t values = shared_address(shared_.v[stage.index]);
    const bool infinite = has_nonfinite<T, kHeadDim, kKeys, kKeys>(values, seen_begin, seen_end);
    if (any_in_warpgroup(warpgroup_, infinite))
      // O += P V, without the products of masked pairs: 0 times Inf or NaN would be NaN
      multiply_seen_values<T, kKeys, kKeys>(o_, p, values, shared_address(rows_.out), warpgroup_,
                                            tile.bounds(first_, 0));
    else
      // O += P V
      start_pv<T, kKeys>(o_, p, values);
    fence_stores();  // V was read through the generic proxy; the next TMA copy overwrites it
    finish_values(number_);
    ++number_;
  }

  // Issues S = Q K^T. The K tile must have arrived.
  __device__ __forceinline__ void multiply_keys(float (&s)[kKeys / 2], unsigned number) {
    start_qk<T, kHeadDim, kKeys>(s, shared_address(rows_.q),
                                 shared_address(shared_.k[Stage<Shape>(number).index]));
  }
  template <int kPending>
  __device__ __forceinline__ void finish_keys(float (&s)[kKeys / 2], unsigned number) {
    wait_for_product<kPending>(s);
    release(shared_.k_empty[Stage<Shape>(number).index]);
    d_.scores.cap(s);
  }
  __device__ __forceinline__ void multiply_values(const uint32_t (&p)[kKeys / 4], unsigned number) {
    const Stage<Shape> stage(number);
    shared_.v_full[stage.index].wait(stage.parity);
    start_pv<T, kKeys>(o_, p, shared_address(shared_.v[stage.index]));
  }
  __device__ __forceinline__ void finish_values(unsigned number) {
    wait_for_product<0>(o_);
    release(shared_.v_empty[Stage<Shape>(number).index]);
  }

  // Epilogue: writes O through shared memory, and lse.
  __device__ __forceinline__ void store(const Scores& weights) {
    const AttentionParams& p = d_.attention;
    // recomputed, like the rows, to save registers: see `run`
    const TileNumber number = TileNumber::of(d_);
    const RequestBlock block = RequestBlock::of(d_, number.b, number.block);
    const Sm90Unit unit = Sm90Unit::of(d_, number, block, warpgroup_);
    const uint32_t staged = shared_address(rows_.out);
    float* const lse = p.lse + (block.b * p.heads + unit.head) * p.seqlen_q + unit.first_query;
    sync_warpgroup(warpgroup_);  // all threads are done with the staging memory
    unroll<2>([&](auto h) {
      const RowScale scale = weights.finish(h, p.sink ? p.sink + unit.head : nullptr, 0);
      const int row = warpgroup_row(h);
      if (threadIdx.x % 4 == 0 && row < unit.queries) lse[row] = scale.lse;
      stage_row<T, h, kHeadDim>(staged, o_, scale.factor, false);
    });
    fence_stores();
    sync_warpgroup(warpgroup_);
    if (p.cu_seqlens_q && unit.queries < kRows)
      return store_rows<T, kHeadDim>(rows_at<T>(p.out, 0, unit.first_query, unit.head), p.out.seq,
                                     unit.queries, staged);
    if (warpgroup_thread() > 0) return;  // TMA clips rows outside of the tensor
    store_boxes<kRows, kHeadDim>(d_.out_map, {unit.first_query, unit.head, block.b}, rows_.out);
    wait_for_stores();
  }

  const Sm90Launch& d_;
  Shared& shared_;
  typename Shared::Rows& rows_;
  int warpgroup_;
  bool exists_;
  int first_;            // position of row 0
  unsigned number_ = 0;  // index of the next key tile
  float o_[kHeadDim / 2];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(Sm90Shape<kHeadDim>::threads(Sm90Shape<kHeadDim>::kMaxWarpgroups),
                                  1)
    block_sparse_forward_sm90_kernel(const __grid_constant__ Sm90Launch d) {
  using Shape = Sm90Shape<kHeadDim>;
  const auto make_empty = [&](const LooseRows& loose, int64_t h) {
    const AttentionParams& p = d.attention;
    loose.fill(rows_at<T>(p.out, 0, 0, h), p.out.seq, p.value_dim, 0);
    loose.fill(p.lse + h * p.seqlen_q, 1, 1, -infinity());
  };
  if (fill_loose_rows(d, make_empty)) return;
  run_roles<Shape, Consumer<T, Shape>>(d);
}

template <typename T, int kHeadDim>
const char* launch_sm90(const BlockSparseParams& d, cudaStream_t stream) {
  using Shape = Sm90Shape<kHeadDim>;
  Sm90Launch plan{};
  if (const char* error = plan_sm90<Shape>(plan, d, d.attention.out)) return error;
  return launch<block_sparse_forward_sm90_kernel<T, kHeadDim>>(
      query_tiles(plan), Shape::threads(plan.warpgroups), Sm90Shared<Shape>::bytes(plan.warpgroups),
      stream, plan);
}

template <typename T>
const char* launch_block_sparse_sm90(const BlockSparseParams& d, cudaStream_t stream) {
  return d.attention.head_dim == 64 ? launch_sm90<T, 64>(d, stream)
                                    : launch_sm90<T, 128>(d, stream);
}

template const char* launch_block_sparse_sm90<TOKENMILL_ELEMENT>(const BlockSparseParams&,
                                                                 cudaStream_t);

}  // namespace tokenmill::cuda::block_sparse_attention
