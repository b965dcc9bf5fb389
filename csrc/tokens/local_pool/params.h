// out = pool over the window around each token, channels last, stride 1. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

// Tap (i, j) of the window of token (y, x) is token (y + dilation_y (i - kernel_y / 2),
// x + dilation_x (j - kernel_x / 2)). Strides in elements.
struct LocalPoolParams {
  int64_t batch, channels;
  int height, width;
  int kernel_y, kernel_x, dilation_y, dilation_x;
  bool is_max, count_include_pad, subtract_input;
  DType dtype;
  const void* x;
  int64_t x_batch, x_line, x_token;
  const bool* mask;  // null: every token counts
  int64_t mask_batch, mask_line, mask_token;
  void* out;  // [batch, height, width, channels]
};

struct LocalPoolBackwardParams {
  LocalPoolParams forward;  // out is dx
  const void* dout;
  int64_t dout_batch, dout_line, dout_token;
  void* workspace;  // CUDA
};

// null, or an error message
const char* launch_cuda(const LocalPoolParams&, void* stream);
const char* launch_cuda(const LocalPoolBackwardParams&, void* stream);
int64_t workspace_bytes(const LocalPoolBackwardParams&);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(local_pool, LocalPoolParams)
TOKENMILL_CPU_KERNEL(local_pool_backward, LocalPoolBackwardParams)
