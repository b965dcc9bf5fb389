// Table of the kernels of linear_attention on GPUs (host_kernels.cpp).
#pragma once
#include "core/kernels.h"
#include "linear/linear_attention/params.h"

namespace tokenmill {

std::span<const Kernel<LinearAttentionParams>> kernels_of(const LinearAttentionParams&);

namespace cuda::linear_attention {

const char* launch_on_sm80(const LinearAttentionParams&, void* stream);
const char* launch_on_sm90(const LinearAttentionParams&, void* stream);

}  // namespace cuda::linear_attention
}  // namespace tokenmill
