// Band masks: the range of columns that a row of scores sees, in int.
#pragma once
#include "attention/band.h"
#include "attention/sequence.cuh"

namespace tokenmill::cuda {

// Operand whose rows a kernel owns; it iterates over the columns, which belong to the other side.
enum class Side { queries, keys };

// Row i sees columns begin(i) .. end(i) - 1. Without a limit, low or high is far beyond any
// sequence.
struct MaskBand {
  int low, high, columns;

  // Clamped to int: no low is far above the diagonal, no high far below it.
  __device__ static MaskBand of(const Band& band) {
    return {static_cast<int>(band.low < -kMaxLength ? -kMaxLength : band.low),
            static_cast<int>(band.high > kMaxLength ? kMaxLength : band.high),
            static_cast<int>(band.columns)};
  }
  // rows are queries, columns keys
  __device__ static MaskBand of(const AttentionParams& p, const Sequence& s) {
    return of(Band::of_window(p.window_left, p.window_right, s.q_length, s.k_length));
  }
  __device__ int begin(int row) const { return max(row + low, 0); }
  __device__ int end(int row) const { return min(row + high, columns); }
};

}  // namespace tokenmill::cuda
