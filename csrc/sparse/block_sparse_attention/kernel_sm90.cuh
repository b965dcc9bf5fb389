// Forward on compute capability 9.0a, of the calls that takes_sm90 lets in.
//
//   S = Q K^T    P = 2^(factor S - row_max)    O = P V
//
// A block has up to three units of 64 rows of queries that share a list, a warpgroup each. One warp
// walks over the keys that any of them sees: the first ones, those of the list, the last ones, in
// tiles of 64. It loads Q once and K and V tile by tile, and says beside each tile of K which keys
// lie there and who sees them. A warpgroup keeps S, P and O in registers. Where no mask cuts, Q K^T
// of a tile and P V of the one before run while P is made.
#pragma once
#include "cuda/attention/epilogue_sm90.cuh"
#include "cuda/attention/hidden_values_sm90.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_sm90_shape.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// The warp that loads.
template <typename Shape>
class Sm90Loader {
 public:
  static constexpr int kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  using Shared = Sm90Shared<Shape>;

  __device__ Sm90Loader(const Sm90Launch& d, Shared& shared)
      : d_(d),
        shared_(shared),
        number_(TileNumber::of(d)),
        block_(RequestBlock::of(d, number_.b, number_.block)) {}

  __device__ __forceinline__ void run() {
    load_queries();
    const int last_query = block_.first_query + block_.queries - 1;
    const SeenKeys of_first = d_.seen_from(block_.first_query + block_.diagonal, block_.length);
    const SeenKeys of_last = d_.seen_from(last_query + block_.diagonal, block_.length);
    const int low = -Seeing::kFar, high = d_.causal ? 1 : Seeing::kFar;
    const int sinks = static_cast<int>(of_last.sinks), end = static_cast<int>(of_last.end);
#pragma unroll 1
    for (int key0 = 0; key0 < sinks; key0 += kKeys) load_tile(key0, {0, sinks, low, high});

    const int num_sink = bounded(d_.num_sink), recent = bounded(d_.num_recent);
    load_list(num_sink, static_cast<int>(of_last.listed), high - recent);
    if (recent > 0) {
      const int begin = max(num_sink, static_cast<int>(of_first.listed));
#pragma unroll 1
      for (int key0 = begin; key0 < end; key0 += kKeys)
        load_tile(key0, {begin, end, high - recent, high});
    }
    const Stage<Shape> stage(tiles_);
    wait(shared_.k_empty[stage.index], stage.parity ^ 1);
    if (!issues()) return;
    shared_.sight[stage.index] = {0, -1, 0, 0};
    shared_.k_full[stage.index].arrive();
  }

 private:
  static __device__ bool issues() { return threadIdx.x == 0; }
  static __device__ int bounded(int64_t keys) {
    return static_cast<int>(keys < Seeing::kFar ? keys : Seeing::kFar);
  }
  // The phase that follows cannot end before all lanes have seen that this one has.
  static __device__ __forceinline__ void wait(Mbarrier& empty, unsigned parity) {
    empty.wait(parity);
    __syncwarp();
  }

  __device__ void load_queries() {
    if (!issues()) return;
    const auto each = [&](const auto& visit) {
#pragma unroll 1
      for (int w = 0; w < d_.warpgroups; ++w) {
        const Sm90Unit unit = Sm90Unit::of(d_, number_, block_, w);
        if (unit.queries > 0) visit(w, unit);
      }
    };
    int bytes = 0;
    each([&](int, const Sm90Unit&) { bytes += Shape::kQueryBytes; });
    shared_.q_full.arrive_expecting(bytes);
    each([&](int w, const Sm90Unit& unit) {
      load_boxes<Shape::kRows, kHeadDim>(d_.query_map, {unit.first_query, unit.head, block_.b},
                                         shared_.rows(w).q, shared_.q_full);
    });
  }

  // Blocks of the list in keys begin .. end - 1: an id counts if it is that of a block and greater
  // than all before it. The lanes have an id each.
  __device__ __forceinline__ void load_list(int begin, int end, int high) {
    const int64_t head = d_.list_head(number_.head);
    const int32_t* const list = d_.list.at(block_.b, head, block_.block);
    const int count = static_cast<int>(d_.list.count(block_.b, head, block_.block));
    const int blocks = static_cast<int>(d_.key_blocks()), size = 1 << d_.log2_block_k;
    const int lane = threadIdx.x % kWarpSize;
    const auto id_at = [&](int e) { return e < count ? list[e] : -1; };
    int largest = -1, next = id_at(lane);  // largest: of the ids so far
#pragma unroll 1
    for (int first = 0; first < count; first += kWarpSize) {
      const int id = next;
      next = id_at(first + kWarpSize + lane);
      int top = max(id, largest);
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2)
        top = max(top, __shfl_up_sync(kFullWarp, top, offset));
      const int before = __shfl_up_sync(kFullWarp, top, 1);
      const bool is_block = id > (lane > 0 ? before : largest) && id < blocks;
      const int key0 = is_block ? id << d_.log2_block_k : 0;
      unsigned left = __ballot_sync(kFullWarp, is_block && key0 < end && key0 + size > begin);
      largest = __shfl_sync(kFullWarp, top, kWarpSize - 1);
#pragma unroll 1
      for (; left; left &= left - 1) {
        const int block = __shfl_sync(kFullWarp, key0, __ffs(left) - 1);
#pragma unroll 1
        for (int key = block; key < block + size; key += kKeys)
          if (key < end && key + kKeys > begin) load_tile(key, {begin, end, -Seeing::kFar, high});
      }
    }
  }

  // From key0 on; `by` as in TileSight, but counted from key 0.
  __device__ __forceinline__ void load_tile(int key0, const TileSight& by) {
    const Stage<Shape> stage(tiles_++);
    const int i = stage.index;
    const AttentionParams& p = d_.attention;
    const BoxPlace at{block_.key_start + key0, static_cast<int>(d_.kv_head(number_.head)),
                      p.cu_seqlens_k ? 0 : block_.request};
    wait(shared_.k_empty[i], stage.parity ^ 1);
    if (issues()) {
      shared_.sight[i] = {max(by.begin - key0, 0), min(by.end - key0, kKeys), by.low - key0,
                          by.high - key0};
      shared_.k_full[i].arrive_expecting(Shape::kKeyBytes);
      load_boxes<kKeys, kHeadDim>(d_.key_map, at, shared_.k[i], shared_.k_full[i]);
    }
    wait(shared_.v_empty[i], stage.parity ^ 1);
    if (issues()) {
      shared_.v_full[i].arrive_expecting(Shape::kKeyBytes);
      load_boxes<kKeys, kHeadDim>(d_.value_map, at, shared_.v[i], shared_.v_full[i]);
    }
  }

  const Sm90Launch& d_;
  Shared& shared_;
  TileNumber number_;
  RequestBlock block_;
  unsigned tiles_ = 0;  // so far
};

// A warpgroup that multiplies: one unit.
template <typename T, typename Shape>
class Sm90Rows {
 public:
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kTileKeys, kHeadDim = Shape::kHeadDim;
  using Shared = Sm90Shared<Shape>;
  using Scores = RowWeights<T, Weights::softmax>;

  __device__ Sm90Rows(const Sm90Launch& d, Shared& shared, int warpgroup)
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
    for (TileSight tile = await_keys(number_); tile.end >= 0;) {
      if (!sees(tile)) {
        skip_tile();
        tile = await_keys(number_);
      } else if (is_whole(tile)) {
        tile = add_whole_tiles(weights);
      } else {
        add_cut_tile(tile, weights);
        tile = await_keys(number_);
      }
    }
    if (exists_) store(weights);
  }

 private:
  // When they are there.
  __device__ __forceinline__ TileSight await_keys(unsigned number) const {
    const Stage<Shape> stage(number);
    shared_.k_full[stage.index].wait(stage.parity);
    return shared_.sight[stage.index];
  }

  // Some of the rows see some of the keys; all of them see all of it. Rows behind the last query
  // count too.
  __device__ bool sees(const TileSight& t) const {
    const int last = first_ + kRows - 1;
    return exists_ && max(t.begin, first_ + t.low) < min(t.end, last + t.high);
  }
  __device__ bool is_whole(const TileSight& t) const {
    const int last = first_ + kRows - 1;
    return exists_ && max(t.begin, last + t.low) <= 0 && min(t.end, first_ + t.high) >= kKeys;
  }

  __device__ __forceinline__ void skip_tile() {
    const Stage<Shape> stage(number_);
    release(shared_.k_empty[stage.index]);
    shared_.v_full[stage.index].wait(stage.parity);
    release(shared_.v_empty[stage.index]);
    ++number_;
  }

  // Tiles from the next one on as long as they are whole. Returns the one behind them.
  __device__ __forceinline__ TileSight add_whole_tiles(Scores& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    weights.weigh(s);
    weights.rescale(o_);
    pack_weights(p, s);
    TileSight next;
#pragma unroll 1
    for (next = await_keys(number_ + 1); is_whole(next); next = await_keys(number_ + 1)) {
      multiply_keys(s, number_ + 1);
      multiply_values(p, number_);
      finish_keys<1>(s, number_ + 1);
      weights.weigh(s);
      finish_values(number_);
      weights.rescale(o_);
      pack_weights(p, s);
      ++number_;
    }
    multiply_values(p, number_);
    finish_values(number_);
    ++number_;
    return next;
  }

  // A tile that a mask or the end of the keys cuts.
  __device__ __forceinline__ void add_cut_tile(const TileSight& tile, Scores& weights) {
    float s[kKeys / 2];
    uint32_t p[kKeys / 4];
    multiply_keys(s, number_);
    finish_keys<0>(s, number_);
    const int last = first_ + kRows - 1;
    const int seen_begin = max(tile.begin, last + tile.low);
    const int seen_end = min(tile.end, first_ + tile.high);
    bounds(tile, 2 * static_cast<int>(threadIdx.x % 4)).hide(s, seen_begin > 0, seen_end < kKeys);
    weights.weigh(s);
    weights.rescale(o_);
    pack_weights(p, s);
    const Stage<Shape> stage(number_);
    shared_.v_full[stage.index].wait(stage.parity);
    const uint32_t values = shared_address(shared_.v[stage.index]);
    const bool infinite =
        has_infinite_values<T, kHeadDim, kKeys, kKeys>(values, seen_begin, seen_end);
    if (any_in_warpgroup(warpgroup_, infinite))
      multiply_seen_values<T, kKeys>(o_, p, values, shared_address(rows_.out), warpgroup_,
                                     bounds(tile, 0));
    else
      start_pv<T, kKeys>(o_, p, values);
    fence_stores();  // values were read as ordinary memory is, and the next copy overwrites them
    finish_values(number_);
    ++number_;
  }

  // Of the thread's rows, counted from column `own` of the tile on.
  __device__ __forceinline__ RowBounds bounds(const TileSight& t, int own) const {
    const int at[2] = {first_ + warpgroup_row(0), first_ + warpgroup_row(1)};
    return {{max(t.begin, at[0] + t.low) - own, max(t.begin, at[1] + t.low) - own},
            {min(t.end, at[0] + t.high) - own, min(t.end, at[1] + t.high) - own}};
  }

  // Which are there.
  __device__ __forceinline__ void multiply_keys(float (&s)[kKeys / 2], unsigned number) {
    start_qk<T, kHeadDim, kKeys>(s, shared_address(rows_.q),
                                 shared_address(shared_.k[Stage<Shape>(number).index]));
  }
  template <int kPending>
  __device__ __forceinline__ void finish_keys(float (&s)[kKeys / 2], unsigned number) {
    wait_for_product<kPending>(s);
    release(shared_.k_empty[Stage<Shape>(number).index]);
    if (d_.scores.cap_scale == 0) return;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) s[i] = tanh_accurate(s[i] * d_.scores.cap_scale);
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

  __device__ __forceinline__ static void pack_weights(uint32_t (&p)[kKeys / 4],
                                                      float (&s)[kKeys / 2]) {
    fence_accumulators(s);
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = Scores::pack(s[2 * i], s[2 * i + 1]);
  }

  // Rows of O through shared memory to the tensor, and their lse.
  __device__ __forceinline__ void store(const Scores& weights) {
    const AttentionParams& p = d_.attention;
    const TileNumber number = TileNumber::of(d_);  // found again, as are the rows: see `run`
    const RequestBlock block = RequestBlock::of(d_, number.b, number.block);
    const Sm90Unit unit = Sm90Unit::of(d_, number, block, warpgroup_);
    const uint32_t staged = shared_address(rows_.out);
    float* const lse = p.lse + (block.b * p.heads + unit.head) * p.seqlen_q + unit.first_query;
    sync_warpgroup(warpgroup_);  // all are done with the memory
    unroll<2>([&](auto h) {
      const RowScale scale = weights.finish(h, p.sink ? p.sink + unit.head : nullptr, 0);
      const int row = warpgroup_row(h);
      if (threadIdx.x % 4 == 0 && row < unit.queries) lse[row] = scale.lse;
      stage_row<T, h>(staged, o_, scale.factor, false);
    });
    fence_stores();
    sync_warpgroup(warpgroup_);
    if (p.cu_seqlens_q && unit.queries < kRows)
      return store_rows<T, kHeadDim>(rows_at<T>(p.out, 0, unit.first_query, unit.head), p.out.seq,
                                     unit.queries, staged);
    if (warpgroup_thread() > 0) return;  // rows that the tensor does not have are left out
    store_boxes<kRows, kHeadDim>(d_.out_map, {unit.first_query, unit.head, block.b}, rows_.out);
    wait_for_stores();
  }

  const Sm90Launch& d_;
  Shared& shared_;
  typename Shared::Rows& rows_;
  int warpgroup_;
  bool exists_;
  int first_;            // position of row 0
  unsigned number_ = 0;  // of the next tile of keys
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
  extern __shared__ __align__(1024) char sm90_shared[];
  auto& shared = *reinterpret_cast<Sm90Shared<Shape>*>(sm90_shared);
  if (threadIdx.x == 0) shared.init_barriers(d.warpgroups);
  __syncthreads();
  // From the first lane: the compiler then knows that it is the same for a warp.
  const int warpgroup =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    shrink_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < kWarpSize) Sm90Loader<Shape>(d, shared).run();
  } else {
    grow_registers<Shape::kMultiplyRegisters>();
    Sm90Rows<T, Shape>(d, shared, warpgroup).run();
  }
}

template <typename T, int kHeadDim>
const char* launch_sm90(const BlockSparseParams& d, cudaStream_t stream) {
  using Shape = Sm90Shape<kHeadDim>;
  const AttentionParams& p = d.attention;
  const Sm90Tensors t(p);
  Sm90Launch plan{plan_queries(d, Shape::kRows, 1, 1)};
  plan.units = static_cast<int>(sm90_units(d));
  plan.tiles = ceil_div(plan.units, Shape::kMaxWarpgroups);
  plan.warpgroups = ceil_div(plan.units, plan.tiles);
  plan.query_blocks = max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, int64_t{1} << d.log2_block_q);
  plan.scores = Sm90Scores::of(p.scale, p.softcap);
  for (auto [map, rows, box] : {std::tuple{&plan.query_map, &t.q, Shape::kRows},
                                {&plan.key_map, &t.k, Shape::kTileKeys},
                                {&plan.value_map, &t.v, Shape::kTileKeys},
                                {&plan.out_map, &t.out, Shape::kRows}})
    if (const char* error = encode_map(*map, *rows, p.dtype, box)) return error;
  return launch<block_sparse_forward_sm90_kernel<T, kHeadDim>>(
      query_tiles(plan), Shape::threads(plan.warpgroups), Sm90Shared<Shape>::bytes(plan.warpgroups),
      stream, plan);
}

// Defined in a generated source for each element type.
template <typename T>
const char* launch_block_sparse_sm90(const BlockSparseParams& d, cudaStream_t stream) {
  return d.attention.head_dim == 64 ? launch_sm90<T, 64>(d, stream)
                                    : launch_sm90<T, 128>(d, stream);
}

}  // namespace tokenmill::cuda::block_sparse_attention
