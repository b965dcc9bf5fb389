// Bounds of each 16 rows of the mask arrays. With them the CUDA kernels skip fully masked blocks of
// queries and keys, and do not test the pairs of fully visible ones.
#pragma once
#include "attention/params.h"

namespace tokenmill {

constexpr int64_t kBoundRows = 16;

// Min and max of `first` and of `last` over some rows. An empty range counts as (INT32_MAX,
// INT32_MIN): it widens no visible region, and makes no block fully visible.
struct alignas(16) PairBounds {
  int32_t min_first, max_first, min_last, max_last;
};

// Rows are counted like the rows of the mask arrays, in packed arrays from the first token on.
// Strides in PairBounds, 0 where broadcast.
struct MaskBounds {
  PairBounds* ranges;             // [B | 1, H | 1, blocks of queries, count]
  PairBounds *q_spans, *k_spans;  // [B | 1, blocks]
  int64_t ranges_batch, ranges_head, q_spans_batch, k_spans_batch;

  struct Sizes {
    int64_t ranges, q_spans, k_spans;
  };

  static Sizes sizes(const AttentionParams& p) {
    const PairMask& m = p.mask;
    const auto batches = [&](int64_t stride) { return stride ? p.batch : 1; };
    const int64_t rows = ceil_div(p.seqlen_q, kBoundRows), keys = ceil_div(p.seqlen_k, kBoundRows);
    const int64_t heads = m.ranges_head ? p.heads : 1;
    return {m.ranges ? batches(m.ranges_batch) * heads * rows * m.count : 0,
            m.q_spans ? batches(m.q_spans_batch) * rows : 0,
            m.q_spans ? batches(m.k_spans_batch) * keys : 0};
  }
  static int64_t bytes(const AttentionParams& p) {
    const Sizes n = sizes(p);
    return (n.ranges + n.q_spans + n.k_spans) * static_cast<int64_t>(sizeof(PairBounds));
  }
  static MaskBounds at(const AttentionParams& p, void* memory) {
    const Sizes n = sizes(p);
    const PairMask& m = p.mask;
    const int64_t rows = ceil_div(p.seqlen_q, kBoundRows), keys = ceil_div(p.seqlen_k, kBoundRows);
    MaskBounds b{};
    b.ranges = static_cast<PairBounds*>(memory);
    b.q_spans = b.ranges + n.ranges;
    b.k_spans = b.q_spans + n.q_spans;
    b.ranges_head = m.ranges_head ? rows * m.count : 0;
    b.ranges_batch = m.ranges_batch ? rows * m.count * (m.ranges_head ? p.heads : 1) : 0;
    b.q_spans_batch = m.q_spans_batch ? rows : 0;
    b.k_spans_batch = m.k_spans_batch ? keys : 0;
    return b;
  }
};

// A call, and memory for the bounds of its mask if it has one.
template <typename Params>
struct Masked {
  Params params;
  MaskBounds bounds;
};

// Returns null or an error message.
const char* launch_cuda(const Masked<AttentionParams>&, void* stream);

}  // namespace tokenmill
