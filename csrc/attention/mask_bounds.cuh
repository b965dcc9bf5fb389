// Bounds of each kBoundRows rows of the mask arrays, computed before the attention kernels of a
// masked call.
#pragma once
#include "attention/mask_bounds.h"
#include "cuda/launch.cuh"

namespace tokenmill::cuda {

constexpr int kBoundThreads = 128;

// One reduction: pairs [..., rows, count, 2] -> `size` bounds [..., blocks, count].
struct BoundsOf {
  const int32_t* pairs;
  PairBounds* to;
  int64_t size, rows, count;
  bool half_open;  // ranges: [begin, end), empty where begin >= end
};

struct BoundsArgs {
  BoundsOf of[3];
};

static __global__ void __launch_bounds__(kBoundThreads)
    mask_bounds_kernel(const __grid_constant__ BoundsArgs args) {
  int64_t at = blockIdx.x * int64_t{kBoundThreads} + threadIdx.x;
#pragma unroll
  for (int n = 0; n < 3; ++n) {
    const BoundsOf& of = args.of[n];
    if (at >= 0 && at < of.size) {
      const int64_t blocks = ceil_div(of.rows, kBoundRows), r = at % of.count;
      const int64_t block = at / of.count % blocks, outer = at / of.count / blocks;
      PairBounds x{INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};
      const int64_t first_row = block * kBoundRows, end = min(first_row + kBoundRows, of.rows);
      for (int64_t row = first_row; row < end; ++row) {
        const int32_t* pair = of.pairs + ((outer * of.rows + row) * of.count + r) * 2;
        const bool empty = of.half_open && pair[0] >= pair[1];
        const int first = empty ? INT32_MAX : pair[0], last = empty ? INT32_MIN : pair[1];
        x = {min(x.min_first, first), max(x.max_first, first), min(x.min_last, last),
             max(x.max_last, last)};
      }
      of.to[at] = x;
    }
    at -= of.size;
  }
}

inline const char* launch_bounds(const AttentionParams& p, const MaskBounds& bounds,
                                 cudaStream_t stream) {
  const PairMask& m = p.mask;
  const MaskBounds::Sizes n = MaskBounds::sizes(p);
  const BoundsArgs args{{{m.ranges, bounds.ranges, n.ranges, p.seqlen_q, m.count, true},
                         {m.q_spans, bounds.q_spans, n.q_spans, p.seqlen_q, 1, false},
                         {m.k_spans, bounds.k_spans, n.k_spans, p.seqlen_k, 1, false}}};
  return launch<mask_bounds_kernel>(ceil_div(n.ranges + n.q_spans + n.k_spans, kBoundThreads),
                                    kBoundThreads, 0, stream, args);
}

}  // namespace tokenmill::cuda
