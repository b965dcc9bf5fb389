#pragma once
#include "attention/params.h"

namespace tokenmill {

// A backward call that the sm_90a kernel takes.
struct Sm90Backward {
  AttentionBackwardParams params;
  float* dq_sums;  // sm90_workspace_bytes(params.forward) bytes
};

}  // namespace tokenmill
