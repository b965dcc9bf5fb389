// Producer warp of the sm_90a query-side kernels: iterates over the sink keys, the listed blocks
// and the recent keys. Also dispatches the warp roles of a CTA.
#pragma once
#include "cuda/arch/sm90/tma.cuh"
#include "sparse/block_sparse_attention/cuda_plan.cuh"
#include "sparse/block_sparse_attention/kernel_sm90_shape.cuh"
#include "sparse/block_sparse_attention/launch_sm90.h"

namespace tokenmill::cuda::block_sparse_attention {

// Producer warp. The backward also loads dO, and zeroes the rows of K that no query sees: 0 times
// NaN would be NaN.
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
    // Unit 0 has the lowest rows: if it is empty, all units are.
    if (Sm90Unit::of(d_, number_, block_, 0).queries > 0) load_keys();
    const Stage<Shape> stage(tiles_);
    wait_as_warp(shared_.k_empty[stage.index], stage.parity ^ 1);
    if (!issues()) return;
    shared_.visibility[stage.index] = {0, -1, 0, 0};
    shared_.k_full[stage.index].arrive();
  }

 private:
  // Streams the K and V tiles that any unit sees.
  __device__ __forceinline__ void load_keys() {
    const int last_query = block_.first_query + block_.queries - 1;
    const SeenKeys of_first = d_.seen_from(block_.first_query + block_.diagonal, block_.length);
    const SeenKeys of_last = d_.seen_from(last_query + block_.diagonal, block_.length);
    const int low = -Seeing::kUnbounded, high = d_.causal ? 1 : Seeing::kUnbounded;
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
  }

  static __device__ bool issues() { return threadIdx.x == 0; }
  static __device__ int bounded(int64_t keys) {
    return static_cast<int>(keys < Seeing::kUnbounded ? keys : Seeing::kUnbounded);
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
    each([&](int, const Sm90Unit&) { bytes += (1 + Shape::kGradient) * Shape::kQueryBytes; });
    shared_.q_full.arrive_expecting(bytes);
    each([&](int w, const Sm90Unit& unit) {
      const BoxPlace at{unit.first_query, unit.head, block_.b};
      load_boxes<Shape::kRows, kHeadDim>(d_.query_map, at, shared_.rows(w).q, shared_.q_full);
      if constexpr (Shape::kGradient)
        load_boxes<Shape::kRows, kHeadDim>(d_.out_map, at, shared_.rows(w).out, shared_.q_full);
    });
  }

  // Streams the listed blocks that overlap keys [begin, end). An id is valid if it is a block index
  // and greater than all previous ids. Each lane holds one id.
  __device__ __forceinline__ void load_list(int begin, int end, int high) {
    const int64_t head = d_.list_head(number_.head);
    const int32_t* const list = d_.list.at(block_.b, head, block_.block);
    const int count = static_cast<int>(d_.list.count(block_.b, head, block_.block));
    const int blocks = static_cast<int>(d_.key_blocks()), size = 1 << d_.log2_block_k;
    const int lane = threadIdx.x % kWarpSize;
    const auto id_at = [&](int e) { return e < count ? list[e] : -1; };
    int largest = -1, next = id_at(lane);  // largest: maximum id so far
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
          if (key < end && key + kKeys > begin)
            load_tile(key, {begin, end, -Seeing::kUnbounded, high});
      }
    }
  }

  // Loads the tile that starts at key0; `by` is its mask with columns counted from key 0.
  __device__ __forceinline__ void load_tile(int key0, const TileMask& by) {
    const Stage<Shape> stage(tiles_++);
    const int i = stage.index;
    const AttentionParams& p = d_.attention;
    const BoxPlace at{block_.key_start + key0, static_cast<int>(d_.kv_head(number_.head)),
                      p.cu_seqlens_k ? 0 : block_.request};
    const TileMask visibility{max(by.begin - key0, 0), min(by.end - key0, kKeys), by.low - key0,
                              by.high - key0};
    wait_as_warp(shared_.k_empty[i], stage.parity ^ 1);
    const bool cleared = Shape::kGradient && (visibility.begin > 0 || visibility.end < kKeys);
    Mbarrier& full = cleared ? shared_.part_full : shared_.k_full[i];
    if (issues()) {
      shared_.visibility[i] = visibility;
      full.arrive_expecting(Shape::kKeyBytes);
      load_boxes<kKeys, kHeadDim>(d_.key_map, at, shared_.k[i], full);
    }
    if (cleared) {
      wait_as_warp(full, parts_++ % 2);
      clear_rows<kKeys, kHeadDim>(shared_.k[i], 0, visibility.begin);
      clear_rows<kKeys, kHeadDim>(shared_.k[i], visibility.end);
      fence_stores();
      __syncwarp();
      if (issues()) shared_.k_full[i].arrive();
    }
    wait_as_warp(shared_.v_empty[i], stage.parity ^ 1);
    if (issues()) {
      shared_.v_full[i].arrive_expecting(Shape::kKeyBytes);
      load_boxes<kKeys, kHeadDim>(d_.value_map, at, shared_.v[i], shared_.v_full[i]);
    }
  }

  const Sm90Launch& d_;
  Shared& shared_;
  TileNumber number_;
  RequestBlock block_;
  unsigned tiles_ = 0,
           parts_ = 0;  // counts so far; parts_ counts tiles that went through part_full
};

// Warp roles of a CTA: one producer warp and `warpgroups` consumer warpgroups.
template <typename Shape, typename Warpgroup, typename Launch>
__device__ __forceinline__ void run_roles(const Launch& d) {
  extern __shared__ __align__(1024) char sm90_shared[];
  auto& shared = *reinterpret_cast<Sm90Shared<Shape>*>(sm90_shared);
  if (threadIdx.x == 0) shared.init_barriers(d.warpgroups);
  __syncthreads();
  // Broadcast from lane 0, so that the compiler knows the value is warp-uniform.
  const int warpgroup =
      __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads, 0) - 1;
  if (warpgroup < 0) {
    shrink_registers<Shape::kLoadRegisters>();
    if (threadIdx.x < kWarpSize) Sm90Loader<Shape>(d, shared).run();
  } else {
    grow_registers<Shape::kMultiplyRegisters>();
    Warpgroup(d, shared, warpgroup).run();
  }
}

// Fills in the grid and the TMA descriptors of a launch. `out` has the shape of the output.
template <typename Shape>
const char* plan_sm90(Sm90Launch& plan, const BlockSparseParams& d, const Rows& out) {
  const AttentionParams& p = d.attention;
  const Sm90Tensors t(p, out);
  static_cast<BlockSparseLaunch&>(plan) = plan_queries(d, Shape::kRows, 1, 1);
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
  return nullptr;
}

}  // namespace tokenmill::cuda::block_sparse_attention
