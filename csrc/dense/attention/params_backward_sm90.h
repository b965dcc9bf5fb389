#pragma once
#include "dense/attention/params.h"

namespace tokenmill {

// A call of the backward that the kernel for compute capability 9.0a takes.
struct Sm90Backward {
  AttentionBackwardParams params;
  float* dq_sums;  // workspace_bytes(params) bytes
};

// 0: it does not take the call. Shapes and the current device decide.
int64_t workspace_bytes(const AttentionBackwardParams&);

const char* launch_cuda(const Sm90Backward&, void* stream);  // null, or what went wrong

}  // namespace tokenmill
