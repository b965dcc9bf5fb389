// Part of a sequence processed by one CTA.
#pragma once
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// Part of a sequence, and its extent.
struct Part {
  int b, slot;        // b: -1 if there is no part; slot: index among the parts of all sequences
  int index, count;   // within the sequence
  int start, length;  // extent of the sequence, in tokens
  int padding;        // tokens missing from the first chunk of the sequence
  int first, end;     // token range of the part, within the sequence

  // Called by all lanes of a warp.
  __device__ Part(const Recurrence& p, const RecurrencePlan& plan, int number)
      : b(number / static_cast<int>(plan.parts)),
        slot(number),
        index(number % static_cast<int>(plan.parts)) {
    if (p.cu_seqlens) {
      const TilePlace place =
          find_tile(p.cu_seqlens, p.batch, p.seqlen, plan.tokens_per_part, number, 1);
      b = place.b;
      index = place.tile;
      start = place.rows.start;
      length = place.rows.length;
      if (b < 0) return;
      slot = first_slot(place.rows, b, plan.tokens_per_part) + index;
    } else {
      start = 0;
      length = static_cast<int>(p.seqlen);
    }
    count = max((length + plan.tokens_per_part - 1) / plan.tokens_per_part, 1);
    // In reverse, chunk boundaries are at the same tokens as in the forward direction.
    padding = plan.reverse ? -length & 63 : 0;
    first = max(index * plan.tokens_per_part - padding, 0);
    end = min((index + 1) * plan.tokens_per_part - padding, length);
  }

  __device__ bool is_last() const { return index == count - 1; }
};

// Index of the first segment of sequence b; reread at each use to save registers. Called by all
// lanes of a warp.
__device__ inline int64_t first_segment(const Recurrence& p, int b) {
  if (!p.cu_seqlens) return b * ((p.seqlen + kSegment - 1) / kSegment);
  return first_slot(rows_of_sequence(p.cu_seqlens, p.batch, p.seqlen, b), b, kSegment);
}

// Zeroes the outputs of tokens outside of every sequence, in one slice of the columns. `part` has b
// < 0.
template <typename T>
__device__ void clear_tokens(const Recurrence& p, const RecurrencePlan& plan, const Part& part,
                             int64_t h, int slice) {
  const LooseRows tokens({-1, part.index, {part.start, part.length}}, p.seqlen,
                         plan.tokens_per_part);
  const int first = slice * plan.warps * kColumnsPerWarp;
  const int columns = min(p.columns - first, plan.warps * kColumnsPerWarp);
  if (sizeof(T) == 4 || p.out_float)
    tokens.fill(rows_at<float>(p.out, 0, 0, h) + first, p.out.seq, columns, 0);
  else
    tokens.fill(rows_at<T>(p.out, 0, 0, h) + first, p.out.seq, columns, 0);
  if (p.normalize && slice == 0) tokens.fill(p.normalizer + h * p.seqlen, 1, 1, kNormalizerEpsilon);
}

}  // namespace tokenmill::cuda::linear_attention
