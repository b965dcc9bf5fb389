// Reduction of the rows of a sequence by segments. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

enum class Reduce : int32_t { sum, mean, amax, amin, first, last };

// Segment s of batch row b is its places offsets[b, s] .. offsets[b, s + 1] - 1. Strides in
// elements.
struct SegmentReduceParams {
  int64_t batch, tokens, channels, segments, places;
  DType dtype;
  Reduce reduce;
  const void* x;  // [B, N, C]
  int64_t x_batch, x_row;
  const int32_t* offsets;  // [B, S + 1]
  int64_t offsets_batch;
  const int32_t* perm;  // [B, P], row of a place; null: the place itself
  int64_t perm_batch;
  const float* weight;  // [B, N], by row; null: 1
  int64_t weight_batch;
  void* y;            // [B, S, C]
  float* weight_sum;  // [B, S]
  int32_t* arg;       // [B, S, C], with amax and amin
  void* workspace;    // CUDA
};

struct SegmentReduceBackwardParams {
  SegmentReduceParams forward;  // includes y, weight_sum and arg
  const void* dy;               // [B, S, C]
  int64_t dy_batch, dy_row;
  const float* dweight_sum;  // [B, S], or null
  int32_t* segment_of_row;   // [B, N]: -1 for a row without a gradient
  void* dx;                  // [B, N, C]
  float* dweight;            // [B, N], or null: not requested
};

struct PlaceRange {
  int64_t begin, end;
};

// Clamped to the existing places; a segment that ends before it begins is empty.
TOKENMILL_HOST_DEVICE inline PlaceRange segment_places(const SegmentReduceParams& p, int64_t b,
                                                       int64_t s) {
  const int32_t* ends = p.offsets + b * p.offsets_batch + s;
  const int64_t begin = ends[0] < 0 ? 0 : ends[0];
  const int64_t end = ends[1] > p.places ? p.places : ends[1];
  return {begin, end < begin ? begin : end};
}

// -1: none
TOKENMILL_HOST_DEVICE inline int32_t row_of_place(const SegmentReduceParams& p, int64_t b,
                                                  int64_t place) {
  if (!p.perm) return static_cast<int32_t>(place);
  const int32_t row = p.perm[b * p.perm_batch + place];
  return row >= 0 && row < p.tokens ? row : -1;
}

// Row that "first" or "last" selects, -1 if there is none.
TOKENMILL_HOST_DEVICE inline int32_t end_row(const SegmentReduceParams& p, int64_t b, int64_t s) {
  const PlaceRange range = segment_places(p, b, s);
  const bool first = p.reduce == Reduce::first;
  for (int64_t i = 0; i < range.end - range.begin; ++i) {
    const int32_t row = row_of_place(p, b, first ? range.begin + i : range.end - 1 - i);
    if (row >= 0) return row;
  }
  return -1;
}

// null, or an error message
const char* launch_cuda(const SegmentReduceParams&, void* stream);
const char* launch_cuda(const SegmentReduceBackwardParams&, void* stream);
int64_t workspace_bytes(const SegmentReduceParams&);  // CUDA

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(segment_reduce, SegmentReduceParams)
TOKENMILL_CPU_KERNEL(segment_reduce_backward, SegmentReduceBackwardParams)
