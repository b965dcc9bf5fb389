#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// outs [n, B, S, H, D] with a contiguous last dimension, lses [n, B, H, S]; strides in elements.
struct MergeParams {
  int64_t parts, batch, seqlen, heads, dim;
  DType dtype;
  const void* outs;
  int64_t outs_part, outs_batch, outs_seq, outs_head;
  const float* lses;  // null: plain sum
  int64_t lses_part, lses_batch, lses_head, lses_seq;
  void* out;   // [B, S, H, D] contiguous
  float* lse;  // [B, H, S] contiguous; unused for a plain sum

  TOKENMILL_HOST_DEVICE int64_t rows() const { return batch * seqlen * heads; }
};

struct MergeBackwardParams {
  MergeParams forward;  // outs and lses; out and lse are unused
  const void* dout;     // [B, S, H, D]
  int64_t dout_batch, dout_seq, dout_head;
  const float* dlse;  // [B, H, S] contiguous, or null
  void* douts;        // [n, B, S, H, D] contiguous
  float* dlses;       // [n, B, H, S] contiguous; unused for a plain sum
};

// Returns null or an error message.
const char* launch_cuda(const MergeParams&, void* stream);
const char* launch_cuda(const MergeBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(merge_states, MergeParams)
TOKENMILL_CPU_KERNEL(merge_states_backward, MergeBackwardParams)
