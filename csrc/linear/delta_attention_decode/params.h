#pragma once
#include "cpu/isa.h"
#include "linear/params.h"
#include "linear/requests.h"

namespace tokenmill {

struct DeltaDecodeParams {
  int64_t batch, heads;  // heads of v
  int64_t key_heads;     // of q and k
  int64_t seqlen, head_dim, value_dim;
  DType dtype;
  bool l2norm;  // of q and k
  float scale;
  Rows q, k, v, out;
  TokenGates beta, log_decay;  // null log_decay: none
  bool per_channel;            // log_decay has head_dim contiguous numbers per token and head
  States state;                // [slots, H, D, Dv], updated in place
  Requests requests;
};

// null, or an error message
const char* launch_cuda(const DeltaDecodeParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(delta_attention_decode, DeltaDecodeParams)
