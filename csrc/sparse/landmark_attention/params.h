// Causal attention with a grouped softmax over blocks, each weighed by its last token. Free of
// torch.
#pragma once
#include "cpu/isa.h"
#include "dense/attention/params.h"

namespace tokenmill {

struct LandmarkParams {
  AttentionParams attention;  // softmax, as many keys as queries; lse is log Z
  int64_t block;              // keys of a block with its landmark; more than there are keys: none
};

struct LandmarkBackwardParams {
  AttentionBackwardParams attention;  // out and lse as the forward left them
  int64_t block;
};

// null, or what went wrong
const char* launch_cuda(const LandmarkParams&, void* stream);
const char* launch_cuda(const LandmarkBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(landmark_attention_forward, LandmarkParams)
TOKENMILL_CPU_KERNEL(landmark_attention_backward, LandmarkBackwardParams)
