// What the first warpgroup of the backward on compute capability 9.0a does: it loads, and adds
// tiles of dQ to their sums.
#pragma once
#include <type_traits>

#include "cuda/arch/sm90/bulk_add.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "dense/attention/kernel_backward_sm90_shape.cuh"

namespace tokenmill::cuda {

// Loads of a warp. Behind the end of a packed sequence lie rows of another one, which may be NaN:
// zeros replace those that a tile has.
class Sm90BackwardLoads {
 public:
  // cut_full: of tiles that have an end.
  __device__ Sm90BackwardLoads(Mbarrier& cut_full, const AttentionParams& p, int b)
      : batch(p.cu_seqlens_q ? 0 : b), cut_full_(cut_full), packed_(p.cu_seqlens_q) {}

  const int batch;  // of boxes

  // load(barrier) of tiles of rows up to `end`, and clear() if the sequence ends before, then
  // `full` ends its phase.
  template <typename Load, typename Clear>
  __device__ __forceinline__ void load(const PackedRows& rows, int end, Mbarrier& full,
                                       const Load& load, const Clear& clear) {
    const bool cut = packed_ && end > rows.length;
    if (threadIdx.x % kWarpSize == 0) load(cut ? cut_full_ : full);
    if (!cut) return;
    cut_full_.wait(cuts_++ % 2);
    clear();
    fence_stores();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) full.arrive();
  }

  // K and V of a block.
  template <typename Shape>
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

 private:
  Mbarrier& cut_full_;
  bool packed_;
  unsigned cuts_ = 0;  // tiles with an end so far
};

// The warp that loads.
template <bool kStatistics, typename Shape>
__device__ void load_backward_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                   Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys) {
  constexpr int kQueries = Shape::kTileQueries, kColumns = Shape::kColumns;
  const AttentionParams& p = bp.forward;
  const int lane = threadIdx.x % kWarpSize;
  Sm90BackwardLoads loads(shared.cut_full, p, keys.place.b);
  loads.load_keys(plan, shared, keys);
  unsigned number = 0;
#pragma unroll 1
  for (int head = keys.h * plan.group; head < (keys.h + 1) * plan.group; ++head) {
#pragma unroll 1
    for (int tile = keys.begin; tile < keys.end; ++tile, ++number) {
      const Stage<Shape> stage(number);
      const int first = tile * kQueries;
      // Lanes that do nothing else must not wait: they could be two phases late.
      if (kStatistics || lane == 0) shared.empty[stage.index].wait(stage.parity ^ 1);
      if constexpr (kStatistics) {
        const int start = keys.queries.start, rows = keys.queries.length - first;
        const float* lse = lse_at(p, bp.minus_lse, keys.place.b, start, head) + first;
        const float* delta = lse_at(p, bp.minus_delta, keys.place.b, start, head) + first;
#pragma unroll 2
        for (int j = lane; j < kQueries; j += kWarpSize) {
          shared.minus_lse[stage.index][j] = j < rows ? lse[j] * plan.lse_factor : 0;
          shared.minus_delta[stage.index][j] = j < rows ? delta[j] : 0;
        }
        __syncwarp();
      }
      loads.load(
          keys.queries, first + kQueries, shared.full[stage.index],
          [&](Mbarrier& full) {
            full.arrive_expecting(2 * Shape::kQueryBytes);
            const BoxPlace at{keys.queries.start + first, head, loads.batch};
            load_boxes<kQueries, kColumns>(plan.q, at, shared.q[stage.index], full);
            load_boxes<kQueries, kColumns>(plan.dout, at, shared.dout[stage.index], full);
          },
          [&] {
            const int rows = max(keys.queries.length - first, 0);
            clear_rows<kQueries, kColumns>(shared.q[stage.index], rows);
            clear_rows<kQueries, kColumns>(shared.dout[stage.index], rows);
          });
    }
  }
}

template <bool kStatistics, int kHeadDim>
__device__ void load_backward_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                   Sm90BackwardShared<Sm90WideShape<kHeadDim>>& shared,
                                   const Sm90KeyTile& keys) {
  using Shape = Sm90WideShape<kHeadDim>;
  constexpr int kQueries = Shape::kTileQueries, kColumns = Shape::kColumns;
  const AttentionParams& p = bp.forward;
  const int lane = threadIdx.x % kWarpSize;
  Sm90BackwardLoads loads(shared.cut_full, p, keys.place.b);
  loads.load_keys(plan, shared, keys);
  unsigned number = 0;
  // Queries first .. of a head, and their statistics times a factor.
  const auto load_tile = [&](const CUtensorMap& map, auto& tiles, auto& stages, int head, int first,
                             const float* statistics, float factor) {
    const Stage<std::remove_reference_t<decltype(stages)>> stage(number);
    if (kStatistics || lane == 0) stages.empty[stage.index].wait(stage.parity ^ 1);
    const int start = keys.queries.start, rows = max(keys.queries.length - first, 0);
    if constexpr (kStatistics) {
      const float* from = lse_at(p, statistics, keys.place.b, start, head) + first;
#pragma unroll 1
      for (int j = lane; j < kQueries; j += kWarpSize)
        stages.statistics[stage.index][j] = j < rows ? from[j] * factor : 0;
      __syncwarp();
    }
    loads.load(
        keys.queries, first + kQueries, stages.full[stage.index],
        [&](Mbarrier& full) {
          full.arrive_expecting(Shape::kQueryBytes);
          load_boxes<kQueries, kColumns>(map, {start + first, head, loads.batch},
                                         tiles[stage.index], full);
        },
        [&] { clear_rows<kQueries, kColumns>(tiles[stage.index], rows); });
  };
#pragma unroll 1
  for (int head = keys.h * plan.group; head < (keys.h + 1) * plan.group; ++head) {
#pragma unroll 1
    for (int tile = keys.begin; tile < keys.end; ++tile, ++number) {
      const int first = tile * kQueries;
      load_tile(plan.q, shared.q, shared.queries, head, first, bp.minus_lse, plan.lse_factor);
      load_tile(plan.dout, shared.dout, shared.gradients, head, first, bp.minus_delta, 1);
    }
  }
}

// The thread that adds tiles of dQ, and slopes of theirs, to the sums, in turns.
template <typename Shape>
__device__ void add_queries_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                 Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys) {
  constexpr int kParts = Shape::kQueryParts, kFloats = Shape::kTileFloats / kParts;
  const uint32_t from = shared_address(shared.dq);
  unsigned number = 0;
#pragma unroll 1
  for (int i = 0; i < plan.group; ++i) {
    const int64_t first_tile = keys.first_tile + int64_t{i} * plan.query_tiles;
    const int64_t first_sum = keys.first_sum + i * plan.head_sums;
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
