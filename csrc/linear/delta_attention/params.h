#pragma once
#include "cpu/isa.h"
#include "linear/params.h"

namespace tokenmill {

struct DeltaAttentionParams {
  int64_t batch, heads;  // batch counts sequences; heads of v
  int64_t key_heads;     // of q and k
  int64_t seqlen;        // packed: all tokens
  int64_t head_dim, value_dim;
  DType dtype;
  bool l2norm;  // of q and k
  float scale;
  Rows q, k, v, out;
  TokenGates beta;            // null: no correction, u = v; decays are per channel then
  TokenGates log_decay;       // null: none
  bool per_channel;           // log_decay has head_dim contiguous numbers per token and head
  States initial, final;      // null: zeros; not wanted
  const int32_t* cu_seqlens;  // [B + 1], null unless packed
  float* workspace;           // CUDA only
};

struct DeltaAttentionBackwardParams {
  DeltaAttentionParams forward;
  Rows dout;                     // null data: zeros
  States dfinal;                 // null: zeros
  Rows dq, dk, dv;               // dtype of q
  TokenGates dbeta, dlog_decay;  // null dbeta: no beta; null dlog_decay: not wanted
  States dinitial;               // null: not wanted
};

// CUDA workspace; depends on shapes only.
int64_t workspace_bytes(const DeltaAttentionParams&);
int64_t workspace_bytes(const DeltaAttentionBackwardParams&);

// null, or an error message
const char* launch_cuda(const DeltaAttentionParams&, void* stream);
const char* launch_cuda(const DeltaAttentionBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(delta_attention_forward, DeltaAttentionParams)
TOKENMILL_CPU_KERNEL(delta_attention_backward, DeltaAttentionBackwardParams)
