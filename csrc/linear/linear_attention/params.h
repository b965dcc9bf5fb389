#pragma once
#include "cpu/isa.h"
#include "linear/params.h"

namespace tokenmill {

struct LinearAttentionParams {
  int64_t batch, heads, kv_heads;  // batch counts sequences
  int64_t seqlen;                  // packed: all tokens
  int64_t head_dim, value_dim;
  DType dtype;
  FeatureMap map;
  bool normalize;
  float scale;
  Rows q, k, v, out;
  LogDecay decay;
  States initial, final;      // null: zeros; not wanted
  float* normalizer;          // [B, H, S], packed [H, T], epsilon included; null unless normalize
  const int32_t* cu_seqlens;  // [B + 1], null unless packed
  int64_t chunk_size;         // a power of two; 0: chosen by the kernel
  float* workspace;           // CUDA only
};

struct LinearAttentionBackwardParams {
  LinearAttentionParams forward;  // includes out and normalizer (if normalize)
  Rows dout;                      // null data: zeros
  States dfinal;                  // null: zeros
  Rows dq, dk, dv;                // dtype of q
  LogDecay ddecay;  // output; per-head decays [B, H] are to be summed; null: not wanted
  States dinitial;  // null: not wanted
};

// CUDA workspace; depends on shapes and the current device.
int64_t workspace_bytes(const LinearAttentionParams&);
int64_t workspace_bytes(const LinearAttentionBackwardParams&);

// null, or an error message
const char* launch_cuda(const LinearAttentionParams&, void* stream);
const char* launch_cuda(const LinearAttentionBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(linear_attention_forward, LinearAttentionParams)
TOKENMILL_CPU_KERNEL(linear_attention_backward, LinearAttentionBackwardParams)
