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
#include "attention/mainloop_sm90.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_sm90_loader.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// Key tiles of a unit. The producer publishes the mask of a tile with its K.
template <typename Shape>
class ListedTiles : public Sm90Tiles {
 public:
  static constexpr bool kWaitsForKeys = true;

  // first: position of row 0
  __device__ ListedTiles(Sm90Shared<Shape>& shared, bool exists, int first)
      : shared_(shared), exists_(exists), first_(first) {
    next(0);
  }

  __device__ __forceinline__ void next(unsigned number) {
    const Stage<Shape> stage(number);
    shared_.k_full[stage.index].wait(stage.parity);
    mask_ = shared_.visibility[stage.index];
  }
  __device__ bool is_left() const { return mask_.end >= 0; }
  __device__ bool sees_any() const { return exists_ && mask_.template any<Shape::kRows>(first_); }
  __device__ bool sees_all() const { return mask_.template all<Shape::kRows>(first_); }
  __device__ KeySpan seen() const {
    const int last = first_ + Shape::kRows - 1;
    return {max(mask_.begin, last + mask_.low), min(mask_.end, first_ + mask_.high)};
  }
  __device__ __forceinline__ RowBounds bounds(int own) const { return mask_.bounds(first_, own); }

 private:
  Sm90Shared<Shape>& shared_;
  bool exists_;
  int first_;
  TileMask mask_;
};

// Consumer warpgroup: computes one unit.
template <typename T, typename Shape>
class Consumer {
 public:
  static constexpr int kRows = Shape::kRows, kHeadDim = Shape::kHeadDim;
  using Shared = Sm90Shared<Shape>;
  using Scores = Sm90ScoreMap<T, Weights::softmax>;

  __device__ Consumer(const Sm90Launch& d, Shared& shared, int warpgroup)
      : d_(d),
        shared_(shared),
        rows_(shared.rows(warpgroup)),
        warpgroup_(warpgroup),
        mainloop_(shared, d.scores, warpgroup) {}

  __device__ __forceinline__ void run() {
    bool exists;
    int first;
    {
      const TileNumber number = TileNumber::of(d_);
      const RequestBlock block = RequestBlock::of(d_, number.b, number.block);
      const Sm90Unit unit = Sm90Unit::of(d_, number, block, warpgroup_);
      exists = unit.queries > 0;
      first = unit.first_query + block.diagonal;
    }
    Scores weights(d_.scores, 0);
    shared_.q_full.wait(0);
    ListedTiles<Shape> tiles(shared_, exists, first);
    mainloop_.run(tiles, shared_address(rows_.q), weights);
    if (exists) store(weights);
  }

 private:
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
      stage_row<T, h, kHeadDim>(staged, mainloop_.o(), scale.factor, false);
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
  Sm90Mainloop<T, Shape, Shared, Scores> mainloop_;
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
