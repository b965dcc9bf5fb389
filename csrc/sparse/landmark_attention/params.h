// Causal attention with a grouped softmax over blocks, each weighted by its last token. Free of
// torch.
#pragma once
#include "attention/params.h"
#include "cpu/isa.h"

namespace tokenmill {

struct LandmarkParams {
  AttentionParams attention;  // softmax, as many keys as queries; lse is log Z
  // keys per block including its landmark; larger than the number of keys: no landmark
  int64_t block;
};

struct LandmarkBackwardParams {
  AttentionBackwardParams attention;  // includes out and lse
  int64_t block;
};

// null, or an error message
const char* launch_cuda(const LandmarkParams&, void* stream);
const char* launch_cuda(const LandmarkBackwardParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(landmark_attention_forward, LandmarkParams)
TOKENMILL_CPU_KERNEL(landmark_attention_backward, LandmarkBackwardParams)
