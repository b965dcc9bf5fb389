// What the first warpgroup of the backward on compute capability 9.0a does: it loads, and adds
// tiles of dQ to their sums.
#pragma once
#include "cuda/arch/sm90/bulk_add.cuh"
#include "cuda/arch/sm90/tma.cuh"
#include "dense/attention/kernel_backward_sm90_shape.cuh"

namespace tokenmill::cuda {

// The warp that loads. Behind the end of a packed sequence lie rows of another one, which may be
// NaN: zeros replace those that a tile has.
template <typename Shape, bool kStatistics>
__device__ void load_backward_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                   Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys) {
  constexpr int kRows = Shape::kRows, kQueries = Shape::kTileQueries, kColumns = Shape::kColumns;
  const AttentionParams& p = bp.forward;
  const int lane = threadIdx.x % kWarpSize, batch = p.cu_seqlens_q ? 0 : keys.place.b;
  unsigned cuts = 0;  // tiles with an end so far
  // load(barrier) and clear() of a tile, then `full` ends its phase.
  const auto load_tile = [&](bool cut, Mbarrier& full, const auto& load, const auto& clear) {
    if (lane == 0) load(cut ? shared.cut_full : full);
    if (!cut) return;
    shared.cut_full.wait(cuts++ % 2);
    clear();
    fence_stores();
    __syncwarp();
    if (lane == 0) full.arrive();
  };
  const auto is_cut = [&](const PackedRows& rows, int end) {
    return p.cu_seqlens_q && end > rows.length;
  };
  load_tile(
      is_cut(keys.place.rows, keys.first + Shape::kBlockKeys), shared.keys_full,
      [&](Mbarrier& full) {
        full.arrive_expecting(2 * Shape::kWarpgroups * Shape::kSlabBytes);
        for (int w = 0; w < Shape::kWarpgroups; ++w) {
          const BoxPlace at{keys.place.rows.start + keys.first + w * kRows, keys.h, batch};
          load_boxes<kRows, kColumns>(plan.k, at, shared.k[w], full);
          load_boxes<kRows, kColumns>(plan.v, at, shared.v[w], full);
        }
      },
      [&] {
        for (int w = 0; w < Shape::kWarpgroups; ++w) {
          const int rows = max(keys.place.rows.length - keys.first - w * kRows, 0);
          clear_rows<kRows, kColumns>(shared.k[w], rows);
          clear_rows<kRows, kColumns>(shared.v[w], rows);
        }
      });
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
      load_tile(
          is_cut(keys.queries, first + kQueries), shared.full[stage.index],
          [&](Mbarrier& full) {
            full.arrive_expecting(2 * Shape::kQueryBytes);
            const BoxPlace at{keys.queries.start + first, head, batch};
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

// The thread that adds tiles of dQ, and slopes of theirs, to the sums, in turns.
template <typename Shape>
__device__ void add_queries_sm90(const AttentionBackwardParams& bp, const Sm90BackwardPlan& plan,
                                 Sm90BackwardShared<Shape>& shared, const Sm90KeyTile& keys) {
  constexpr int kBytes = Shape::kTileFloats * 4;
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
      const uint32_t from = shared_address(shared.dq);
      shared.dq_full.wait(number % 2);
      await_turn(plan.turns + at, turn);
      if (turn == 0)
        store_bulk(to, from, kBytes);
      else
        add_bulk(to, from, kBytes);
      if (bp.sums) {
        const float* slopes = shared.slope_sums[number % 3];
        float sum = 0;
        for (int w = 0; w < Shape::kWarpgroups * 4; ++w) sum += slopes[w];
        bp.sums[2 * (first_sum + tile * (Shape::kTileQueries / 16))] +=
            plan.fast ? 0.25f * sum : sum;
      }
      wait_for_stores();
      shared.dq_empty.arrive();
      wait_for_bulk();
      end_turn(plan.turns + at, turn);
    }
  }
}

}  // namespace tokenmill::cuda
