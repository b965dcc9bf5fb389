#pragma once
#include "cpu/isa.h"
#include "linear/conv_params.h"

namespace tokenmill {

struct ConvDecodeParams {
  int64_t batch, seqlen, channels;
  int64_t slots;
  int64_t columns;  // of a state, at least W - 1
  DType dtype;
  ConvFilter filter;
  ConvRows x, out;
  ConvStates state;        // [slots, C, columns], updated in place
  const int32_t* indices;  // [B], a slot each; < 0 or >= slots: out is 0, no state changes. null: b
};

// null, or an error message
const char* launch_cuda(const ConvDecodeParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(causal_conv1d_decode, ConvDecodeParams)
