// Which columns a row of scores sees, in ints: bands along the diagonal.
#pragma once
#include "cuda/attention/sequence.cuh"
#include "dense/attention/band.h"

namespace tokenmill::cuda {

// Whose rows a kernel owns; it runs over the columns, which belong to the other side.
enum class Side { queries, keys };

// Row i sees columns begin(i) .. end(i) - 1. In ints: low and high are far beyond any sequence
// where there is no limit.
struct MaskBand {
  int low, high, columns;

  // Neither is a low far above the diagonal nor a high far below it.
  __device__ static MaskBand of(const Band& band) {
    return {static_cast<int>(band.low < -kMaxLength ? -kMaxLength : band.low),
            static_cast<int>(band.high > kMaxLength ? kMaxLength : band.high),
            static_cast<int>(band.columns)};
  }
  // Of queries.
  __device__ static MaskBand of(const AttentionParams& p, const Sequence& s) {
    return of(Band::of_window(p.window_left, p.window_right, s.q_length, s.k_length));
  }
  __device__ int begin(int row) const { return max(row + low, 0); }
  __device__ int end(int row) const { return min(row + high, columns); }
};

}  // namespace tokenmill::cuda
