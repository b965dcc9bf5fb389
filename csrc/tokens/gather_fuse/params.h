// out = [prefix; x[keep]; f] with f = sum over rest of weight_j x_j. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// Strides in elements. Patch j is token prefix + j.
struct GatherFuseParams {
  int64_t batch, prefix, patches, channels;
  int64_t kept, rest;  // entries of the lists
  DType dtype;
  bool normalize;
  const void* x;
  int64_t x_batch, x_token;
  const int32_t *keep_ids, *rest_ids;
  int64_t keep_batch, rest_batch;
  const float* weight;
  int64_t weight_batch;
  void* out;  // [batch, prefix + kept + 1, channels]
  int64_t out_batch, out_row;
  float* weight_sum;      // [batch]
  const int32_t* places;  // CPU: [batch, patches], as in the backward

  TOKENMILL_HOST_DEVICE int64_t rows() const { return prefix + kept + 1; }  // rows of out
};

struct GatherFuseBackwardParams {
  GatherFuseParams forward;  // includes weight_sum; out is unused
  const void* dout;
  int64_t dout_batch, dout_row;
  const void* fused;  // last row of out
  int64_t fused_batch;
  int32_t* places;  // [batch, patches]: index in keep, or kept + index in rest, or -1
  void* dx;         // [batch, prefix + patches, channels]
  float* dweight;   // [batch, patches]
};

// null, or an error message. The backward writes places.
const char* launch_cuda(const GatherFuseParams&, void* stream);
const char* launch_cuda(const GatherFuseBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(gather_fuse, GatherFuseParams)
// Reads places.
TOKENMILL_CPU_KERNEL(gather_fuse_backward, GatherFuseBackwardParams)
