// Tables of the kernels of attention on GPUs (host_kernels.cpp).
#pragma once
#include "attention/mask_bounds.h"
#include "core/kernels.h"

namespace tokenmill {

struct AttentionBackwardCall {
  AttentionBackwardParams params;
  MaskBounds bounds;  // memory for the bounds of the mask if the call has one
  void* workspace;    // workspace_bytes(call) bytes
};

std::span<const Kernel<Masked<AttentionParams>>> kernels_of(const Masked<AttentionParams>&);
std::span<const Kernel<AttentionBackwardCall>> kernels_of(const AttentionBackwardCall&);

// Depends on shapes and the current device.
int64_t workspace_bytes(const AttentionBackwardCall&);
// Returns null or an error message.
const char* launch_cuda(const AttentionBackwardCall&, void* stream);

namespace cuda {

const char* launch_on_sm80(const Masked<AttentionParams>&, void* stream);
const char* launch_on_sm80(const AttentionBackwardCall&, void* stream);
const char* launch_on_sm90(const Masked<AttentionParams>&, void* stream);
const char* launch_on_sm90(const AttentionBackwardCall&, void* stream);

}  // namespace cuda
}  // namespace tokenmill
