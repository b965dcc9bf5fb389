// Which columns a row of scores sees, in ints: bands along the diagonal.
#pragma once
#include "cuda/attention/sequence.cuh"
#include "dense/attention/band.h"

namespace tokenmill::cuda {

// Whose rows a kernel owns; it runs over the columns, which belong to the other side.
enum class Side { queries, keys };

// Band in ints: low and high are far beyond any sequence where there is no limit.
struct WarpBand {
  int low, high, columns;

  WarpBand() = default;
  __device__ WarpBand(const AttentionParams& p, const Sequence& s) : columns(s.k_length) {
    const Band band = Band::of_window(p.window_left, p.window_right, s.q_length, s.k_length);
    low = static_cast<int>(band.low < -kMaxLength ? -kMaxLength : band.low);
    high = static_cast<int>(band.high > kMaxLength ? kMaxLength : band.high);
  }
  __device__ int begin(int row) const { return max(row + low, 0); }
  __device__ int end(int row) const { return min(row + high, columns); }
};

// Row i sees columns begin(i) .. end(i) - 1.
struct ColumnBand {
  int low, high, columns;

  __device__ static ColumnBand of(const Band& band) {
    return {clamp(band.low), clamp(band.high), static_cast<int>(band.columns)};
  }
  __device__ int begin(int row) const { return max(row + low, 0); }
  __device__ int end(int row) const { return min(row + high, columns); }

 private:
  __device__ static int clamp(int64_t x) {
    return static_cast<int>(x < -kMaxLength ? -kMaxLength : x > kMaxLength ? kMaxLength : x);
  }
};

}  // namespace tokenmill::cuda
