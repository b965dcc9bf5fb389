#pragma once
#include "cpu/isa.h"
#include "linear/conv_params.h"

namespace tokenmill {

struct CausalConv1dParams {
  int64_t batch;   // sequences
  int64_t seqlen;  // tokens of a sequence; packed: of all
  int64_t rows;    // tokens of all sequences
  int64_t channels;
  DType dtype;
  ConvFilter filter;
  ConvRows x, out;
  ConvStates initial, final;  // [batch, C, W - 1]; null: zeros; not wanted
  const int32_t* cu_seqlens;  // [batch + 1], null unless packed
};

struct CausalConv1dBackwardParams {
  CausalConv1dParams forward;
  ConvRows dout, dx;
  ConvStates dfinal, dinitial;  // null: zeros; not wanted
  int64_t part_rows;            // tokens summed into one part of the gradients of the filter
  float* parts;                 // [ceil(rows / part_rows), W + 1, C], row W of the bias
  float* dpre;                  // [rows, C], gradients before the activation; null on CPUs
  void *dweight, *dbias;        // [C, W] and [C] in the dtypes of the filter; null dbias: no bias
};

// null, or an error message
const char* launch_cuda(const CausalConv1dParams&, void* stream);
const char* launch_cuda(const CausalConv1dBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(causal_conv1d_forward, CausalConv1dParams)
TOKENMILL_CPU_KERNEL(causal_conv1d_backward, CausalConv1dBackwardParams)
