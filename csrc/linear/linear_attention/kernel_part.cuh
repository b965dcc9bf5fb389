// The part of a sequence that a block runs through.
#pragma once
#include "linear/linear_attention/kernel_shape.cuh"

namespace tokenmill::cuda::linear_attention {

// Which part of which sequence a block has.
struct Part {
  int64_t b, slot;    // slot: number of the part among those of all sequences
  int index, count;   // among the parts of the sequence
  int start, length;  // of the sequence, in tokens
  int padding;        // by which the first chunk of the sequence is short
  int first, end;     // of the part, in tokens of the sequence

  // All lanes of a warp together.
  __device__ Part(const Recurrence& p, const RecurrencePlan& plan, int64_t number)
      : b(number / plan.parts), slot(number), index(number % plan.parts) {
    if (p.cu_seqlens) {
      const TilePlace place =
          find_tile(p.cu_seqlens, p.batch, p.seqlen, plan.tokens_per_part, number, 1);
      b = place.b;
      index = place.tile;
      if (b < 0) return;
      start = clamped_end(p.cu_seqlens, b, p.seqlen);
      length = max(clamped_end(p.cu_seqlens, b + 1, p.seqlen) - start, 0);
    } else {
      start = 0;
      length = static_cast<int>(p.seqlen);
    }
    count = max((length + plan.tokens_per_part - 1) / plan.tokens_per_part, 1);
    // Backwards, chunks end where they would forwards.
    padding = plan.reverse ? -length & 63 : 0;
    first = max(index * plan.tokens_per_part - padding, 0);
    end = min((index + 1) * plan.tokens_per_part - padding, length);
  }

  __device__ bool is_last() const { return index == count - 1; }
};

}  // namespace tokenmill::cuda::linear_attention
