#pragma once
#include "cpu/isa.h"
#include "linear/conv_params.h"
#include "linear/requests.h"

namespace tokenmill {

struct ConvDecodeParams {
  int64_t batch, seqlen, channels;
  int64_t columns;  // of a state, at least W - 1
  DType dtype;
  ConvFilter filter;
  ConvRows x, out;
  ConvStates state;  // [slots, C, columns], updated in place
  Requests requests;
};

// null, or an error message
const char* launch_cuda(const ConvDecodeParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(causal_conv1d_decode, ConvDecodeParams)
