#pragma once
#include "cpu/isa.h"
#include "linear/params.h"
#include "linear/requests.h"

namespace tokenmill {

struct LinearDecodeParams {
  int64_t batch, heads, kv_heads, seqlen, head_dim, value_dim;
  DType dtype;
  FeatureMap map;
  bool normalize;
  float scale;
  Rows q, k, v, out;
  LogDecay decay;
  States state;  // [slots, H, F, Dv(+ 1)], updated in place
  Requests requests;
  float* draft;  // CUDA only, with requests.accepted: [B, H, F, Dv(+ 1)] after tokens not kept
};

// CUDA workspace; depends on shapes only.
int64_t workspace_bytes(const LinearDecodeParams&);

// null, or an error message
const char* launch_cuda(const LinearDecodeParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(linear_attention_decode, LinearDecodeParams)
