// Preprocess kernel of the backward: row statistics.
#pragma once
#include "attention/backward_shape.cuh"
#include "attention/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace tokenmill::cuda {

constexpr int kStatisticsThreads = 128, kLanesOfRow = 8, kRowsOfLanes = 4;
constexpr int kStatisticsRows = kStatisticsThreads / kLanesOfRow * kRowsOfLanes;  // rows per CTA

// softmax: minus_lse in bits (nats for Mode::general), -inf, and with it P = 0, for rows without
// visible keys; minus_delta = dlse - rowsum(dO O). Other maps: minus_lse holds the normalisation
// factor of the row. A CTA has rows of one head.
template <typename T, int kVector>
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_kernel(const __grid_constant__ BackwardArgs args, float unit) {
  const AttentionBackwardParams& bp = args.p;
  const AttentionParams& p = bp.forward;
  const int64_t bh = blockIdx.x / args.row_blocks, h = bh % p.heads;
  TilePlace place = {static_cast<int>(bh / p.heads),
                     static_cast<int>(blockIdx.x % args.row_blocks),
                     {0, static_cast<int>(p.seqlen_q)}};
  if (p.cu_seqlens_q) {
    place = find_tile(p.cu_seqlens_q, p.batch, p.seqlen_q, kStatisticsRows, place.tile);
    if (place.b < 0) {
      const LooseRows rows(place, p.seqlen_q, kStatisticsRows);
      rows.fill(lse_at(p, bp.minus_lse, 0, 0, h), 1, 1, -infinity());
      rows.fill(lse_at(p, bp.minus_delta, 0, 0, h), 1, 1, 0);
      return;
    }
  }
  const int64_t batch = place.b;
  const Sequence s = sequence_of(p, batch, place.rows);
  const int lane = threadIdx.x % kLanesOfRow;
  int row = place.tile * kStatisticsRows + threadIdx.x / kLanesOfRow;
  if (row - static_cast<int>(threadIdx.x) / kLanesOfRow >= s.q_length) return;
  const T* out = rows_at<const T>(p.out, batch, s.q_start + row, h);
  const T* dout = rows_at<const T>(bp.dout, batch, s.q_start + row, h);
  const bool has_delta = p.map == ScoreMap::softmax || p.normalize == Normalize::sum;
  const int64_t columns = has_delta ? p.value_dim : 0;
  float dot[kRowsOfLanes] = {};  // rowsum(dO O)
  constexpr int kStep = kStatisticsThreads / kLanesOfRow;
#pragma unroll
  for (int r = 0; r < kRowsOfLanes; ++r) {
    if (row + r * kStep >= s.q_length) continue;
    for (int d = lane * kVector; d < columns; d += kLanesOfRow * kVector) {
      float x[kVector], y[kVector];
      load_floats(x, out + r * kStep * p.out.seq + d);
      load_floats(y, dout + r * kStep * bp.dout.seq + d);
#pragma unroll
      for (int j = 0; j < kVector; ++j) dot[r] = fmaf(x[j], y[j], dot[r]);
    }
  }
  static_assert(kLanesOfRow == 8 && kRowsOfLanes == 4);
  // Lane i of a group of 8 keeps the sum of row i / 2.
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float other = __shfl_xor_sync(kFullWarp, lane & 4 ? dot[r] : dot[r + 2], 4);
    dot[r] = (lane & 4 ? dot[r + 2] : dot[r]) + other;
  }
  const float other = __shfl_xor_sync(kFullWarp, lane & 2 ? dot[0] : dot[1], 2);
  float sum = (lane & 2 ? dot[1] : dot[0]) + other;
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  row += lane / 2 * kStep;
  if (lane & 1 || row >= s.q_length) return;
  const float lse = p.lse ? lse_at(p, p.lse, batch, s.q_start, h)[row] : 0;
  const float dlse = bp.dlse ? lse_at(p, bp.dlse, batch, s.q_start, h)[row] : 0;
  if (p.map != ScoreMap::softmax) {
    const float inverse = inverse_of_row(p.map, p.normalize, lse);
    if (p.map == ScoreMap::linear) sum = lse > 1 ? sum : lse < -1 ? -sum : 0;
    lse_at(p, bp.minus_lse, batch, s.q_start, h)[row] = inverse;
    lse_at(p, bp.minus_delta, batch, s.q_start, h)[row] = (bp.dlse ? dlse / inverse : 0) - sum;
    return;
  }
  const float constant = constant_of(p, batch, h, s.k_length);
  lse_at(p, bp.minus_lse, batch, s.q_start, h)[row] =
      lse == -infinity() ? lse : (constant - lse) * unit;
  lse_at(p, bp.minus_delta, batch, s.q_start, h)[row] = dlse - sum;
}

template <typename T>
const char* launch_statistics(BackwardArgs args, bool in_nats, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const AttentionParams& p = args.p.forward;
  const Rows &o = p.out, &g = args.p.dout;
  const bool vectors = is_vectorizable<T>(o.data, p.value_dim, o.batch, o.seq, o.head) &&
                       is_vectorizable<T>(g.data, p.value_dim, g.batch, g.seq, g.head);
  args.row_blocks = max_tiles(p.cu_seqlens_q, p.batch, p.seqlen_q, kStatisticsRows);
  const int64_t blocks = args.row_blocks * p.heads * (p.cu_seqlens_q ? 1 : p.batch);
  const float unit = in_nats ? 1 : kLog2e;
  return vectors
             ? launch<statistics_kernel<T, kVector>>(blocks, kStatisticsThreads, 0, stream, args,
                                                     unit)
             : launch<statistics_kernel<T, 1>>(blocks, kStatisticsThreads, 0, stream, args, unit);
}

}  // namespace tokenmill::cuda
