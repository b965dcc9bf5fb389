#pragma once
#include "attention/params.h"

namespace tokenmill {

// A backward call that the sm_90a kernel takes.
struct Sm90Backward {
  AttentionBackwardParams params;
  float* dq_sums;  // workspace_bytes(params) bytes
};

// Workspace size; 0: the sm_90a kernel does not take the call. Depends on shapes and the current
// device.
int64_t workspace_bytes(const AttentionBackwardParams&);

const char* launch_cuda(const Sm90Backward&, void* stream);  // returns null or an error message

}  // namespace tokenmill
