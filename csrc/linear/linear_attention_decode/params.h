#pragma once
#include "cpu/isa.h"
#include "linear/params.h"

namespace tokenmill {

struct LinearDecodeParams {
  int64_t batch, heads, kv_heads, seqlen, head_dim, value_dim;
  int64_t slots;
  DType dtype;
  FeatureMap map;
  bool normalize;
  float scale;
  Rows q, k, v, out;
  LogDecay decay;
  States state;            // [slots, H, F, Dv(+ 1)], updated in place
  const int32_t* indices;  // [B], a slot each; < 0 or >= slots: out is 0, no state changes. null: b
};

// null, or an error message
const char* launch_cuda(const LinearDecodeParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(linear_attention_decode, LinearDecodeParams)
