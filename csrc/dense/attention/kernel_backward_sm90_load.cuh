// Producer warp and dQ warp of the sm_90a backward.
#pragma once
#include <type_traits>

#include "cuda/arch/sm90/bulk_add.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "dense/attention/kernel_backward_sm90_shape.cuh"

namespace tokenmill::cuda {

// Loads of the producer warp. Rows after the end of a packed sequence belong to another one and may
// be NaN: in a tile that is cut they are cleared. kStatistics: the lanes also load row statistics.
template <typename Shape, bool kStatistics>
class Sm90BackwardLoads {
 public:
  // cut_full: barrier for tiles that contain the end of a sequence.
  __device__ Sm90BackwardLoads(Mbarrier& cut_full, const AttentionParams& p, int b)
      : batch(p.cu_seqlens_q ? 0 : b), cut_full_(cut_full), packed_(p.cu_seqlens_q) {}

  const int batch;  // batch coordinate of TMA boxes

  // Waits for an empty stage. Lanes that load nothing must not wait: they could be two phases late.
  __device__ __forceinline__ void wait(Mbarrier& empty, unsigned parity) {
    if (kStatistics || threadIdx.x % kWarpSize == 0) empty.wait(parity);
  }

  // Statistics of the first `rows` rows, times factor, then zeros.
  __device__ __forceinline__ void load_statistics(float (&to)[Shape::kTileQueries],
                                                  const float* from, int rows, float factor) {
    if constexpr (kStatistics) {
      constexpr int kAtOnce = Shape::kWide ? 1 : 2;  // wide heads have no registers for more
#pragma unroll kAtOnce
      for (int j = threadIdx.x % kWarpSize; j < Shape::kTileQueries; j += kWarpSize)
        to[j] = j < rows ? from[j] * factor : 0;
      __syncwarp();
    }
  }

  // Issues copy(barrier) for tiles of rows up to `end`; if the sequence ends before, waits and
  // calls clear_end(). Then `full` completes its phase.
  template <typename Copy, typename ClearEnd>
  __device__ __forceinline__ void load(const PackedRows& rows, int end, Mbarrier& full,
                                       const Copy& copy, const ClearEnd& clear_end) {
    const bool cut = packed_ && end > rows.length;
    if (threadIdx.x % kWarpSize == 0) copy(cut ? cut_full_ : full);
    if (!cut) return;
    cut_full_.wait(cuts_++ % 2);
    clear_end();
    fence_stores();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) full.arrive();
  }

  // K and V of a CTA.
  __device__ __forceinline__ void load_keys(const Sm90BackwardPlan& plan,
                                            Sm90BackwardShared<Shape>& shared,
                                            const Sm90KeyTile& keys) {
    constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns;
    const PackedRows& all = keys.place.rows;
    load(
        all, keys.first + Shape::kBlockKeys, shared.keys_full,
        [&](Mbarrier& full) {
          full.arrive_expecting(2 * Shape::kSlabs * Shape::kSlabBytes);
          for (int i = 0; i < Shape::kSlabs; ++i) {
            const BoxPlace at{all.start + keys.first + i * kRows, keys.h, batch};
            load_boxes<kRows, kColumns>(plan.k, at, shared.k[i], full);
            load_boxes<kRows, kColumns>(plan.v, at, shared.v[i], full);
          }
        },
        [&] {
          for (int i = 0; i < Shape::kSlabs; ++i) {
            const int rows = max(all.length - keys.first - i * kRows, 0);
            clear_rows<kRows, kColumns>(shared.k[i], rows);
            clear_rows<kRows, kColumns>(shared.v[i], rows);
          }
        });
  }

  // Calls visit(head, first query, number) for all query tiles.
  template <typename Visit>
  __device__ __forceinline__ void for_tiles(const Sm90BackwardPlan& plan, const Sm90KeyTile& keys,
                                            const Visit& visit) {
    unsigned number = 0;
#pragma unroll 1
    for (int head = keys.h * plan.group; head < (keys.h + 1) * plan.group; ++head) {
#pragma unroll 1
      for (int tile = keys.begin; tile < keys.end; ++tile, ++number)
        visit(head, tile * Shape::kTileQueries, number);
    }
  }

 private:
  Mbarrier& cut_full_;
  bool packed_;
  unsigned cuts_ = 0;  // tiles with an end so far
};

// Producer warp.
template <bool kStatistics, typename Shape>
__device__ void load_backward_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                   Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys) {
  constexpr int kQueries = Shape::kTileQueries, kColumns = Shape::kColumns;
  const AttentionParams& p = bp.forward;
  Sm90BackwardLoads<Shape, kStatistics> loads(shared.cut_full, p, keys.place.b);
  loads.load_keys(plan, shared, keys);
  loads.for_tiles(plan, keys, [&](int head, int first, unsigned number) {
    const Stage<Shape> stage(number);
    loads.wait(shared.empty[stage.index], stage.parity ^ 1);
    const int start = keys.queries.start, rows = keys.queries.length - first;
    const auto load_statistics = [&](auto& to, const float* from, float factor) {
      loads.load_statistics(to[stage.index], lse_at(p, from, keys.place.b, start, head) + first,
                            rows, factor);
    };
    load_statistics(shared.minus_lse, bp.minus_lse, plan.lse_factor);
    load_statistics(shared.minus_delta, bp.minus_delta, 1);
    loads.load(
        keys.queries, first + kQueries, shared.full[stage.index],
        [&](Mbarrier& full) {
          full.arrive_expecting(2 * Shape::kQueryBytes);
          const BoxPlace at{start + first, head, loads.batch};
          load_boxes<kQueries, kColumns>(plan.q, at, shared.q[stage.index], full);
          load_boxes<kQueries, kColumns>(plan.dout, at, shared.dout[stage.index], full);
        },
        [&] {
          clear_rows<kQueries, kColumns>(shared.q[stage.index], max(rows, 0));
          clear_rows<kQueries, kColumns>(shared.dout[stage.index], max(rows, 0));
        });
  });
}

template <bool kStatistics, int kHeadDim>
__device__ void load_backward_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                   Sm90BackwardShared<Sm90WideShape<kHeadDim>>& shared,
                                   const Sm90KeyTile& keys) {
  using Shape = Sm90WideShape<kHeadDim>;
  constexpr int kQueries = Shape::kTileQueries, kColumns = Shape::kColumns;
  const AttentionParams& p = bp.forward;
  Sm90BackwardLoads<Shape, kStatistics> loads(shared.cut_full, p, keys.place.b);
  loads.load_keys(plan, shared, keys);
  loads.for_tiles(plan, keys, [&](int head, int first, unsigned number) {
    const int start = keys.queries.start, rows = max(keys.queries.length - first, 0);
    const auto load_tile = [&](const CUtensorMap& map, auto& tiles, auto& stages,
                               const float* statistics, float factor) {
      const Stage<std::remove_reference_t<decltype(stages)>> stage(number);
      loads.wait(stages.empty[stage.index], stage.parity ^ 1);
      loads.load_statistics(stages.statistics[stage.index],
                            lse_at(p, statistics, keys.place.b, start, head) + first, rows, factor);
      loads.load(
          keys.queries, first + kQueries, stages.full[stage.index],
          [&](Mbarrier& full) {
            full.arrive_expecting(Shape::kQueryBytes);
            load_boxes<kQueries, kColumns>(map, {start + first, head, loads.batch},
                                           tiles[stage.index], full);
          },
          [&] { clear_rows<kQueries, kColumns>(tiles[stage.index], rows); });
    };
    load_tile(plan.q, shared.q, shared.queries, bp.minus_lse, plan.lse_factor);
    load_tile(plan.dout, shared.dout, shared.gradients, bp.minus_delta, 1);
  });
}

// Thread that adds dQ tiles, and their slope sums, to the accumulators in global memory, in turns.
template <typename Shape>
__device__ void add_queries_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                 Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys) {
  constexpr int kParts = Shape::kQueryParts, kFloats = Shape::kTileFloats / kParts;
  const uint32_t from = shared_address(shared.dq);
  unsigned number = 0;
#pragma unroll 1
  for (int member = 0; member < plan.group; ++member) {
    const int64_t first_tile = keys.first_tile + int64_t{member} * plan.query_tiles;
    const int64_t first_sum = keys.first_sum + member * plan.head_sums;
#pragma unroll 1
    for (int tile = keys.begin; tile < keys.end; ++tile, ++number) {
      const int64_t at = first_tile + tile;
      const unsigned turn = keys.turn<Shape>(bp.forward, tile);
      float* const to = plan.dq + at * Shape::kTileFloats;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const unsigned i = number * kParts + part;
        shared.dq_full.wait(i % 2);
        if (part == 0) await_turn(plan.turns + at, turn);
        if (turn == 0)
          store_bulk(to + part * kFloats, from, kFloats * 4);
        else
          add_bulk(to + part * kFloats, from, kFloats * 4);
        if (part == 0 && bp.sums) {
          const float sum = shared.slope_sums.of(number);
          bp.sums[2 * (first_sum + tile * (Shape::kTileQueries / 16))] +=
              plan.fast ? 0.25f * sum : sum;
        }
        wait_for_stores();
        shared.dq_empty[i % Shape::kEmptyBarriers].arrive();
      }
      wait_for_bulk();
      end_turn(plan.turns + at, turn);
    }
  }
}

}  // namespace tokenmill::cuda
