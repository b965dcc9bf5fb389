#pragma once
#include "cpu/isa.h"
#include "linear/params.h"

namespace tokenmill {

struct DeltaDecodeParams {
  int64_t batch, heads;  // heads of v
  int64_t key_heads;     // of q and k
  int64_t seqlen, head_dim, value_dim;
  int64_t slots;
  DType dtype;
  bool l2norm;  // of q and k
  float scale;
  Rows q, k, v, out;
  TokenGates beta, log_decay;  // null log_decay: none
  bool per_channel;            // log_decay has head_dim contiguous numbers per token and head
  States state;                // [slots, H, D, Dv], updated in place
  const int32_t* indices;  // [B], a slot each; < 0 or >= slots: out is 0, no state changes. null: b
};

// null, or an error message
const char* launch_cuda(const DeltaDecodeParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(delta_attention_decode, DeltaDecodeParams)
