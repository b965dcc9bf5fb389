// Table of the kernels of attention_decode on GPUs (host_kernels.cpp).
#pragma once
#include "core/kernels.h"
#include "dense/attention_decode/params.h"

namespace tokenmill {

std::span<const Kernel<DecodeParams>> kernels_of(const DecodeParams&);

namespace cuda {

// Rows of a tile of the sm_90a decode kernel: queries times heads of a GQA group.
constexpr int kMaxSm90DecodeRows = 64;

// The decode kernels require the same number of queries in each request, and a causal mask.
inline bool prefills(const AttentionParams& p) { return p.cu_seqlens_q || p.window_right != 0; }

const char* launch_on_sm80(const DecodeParams&, void* stream);
const char* launch_forward_on_sm90(const DecodeParams&, void* stream);
const char* launch_decode_on_sm90(const DecodeParams&, void* stream);

int64_t workspace_of_sm80(const DecodeParams&);
int64_t workspace_of_decode_sm90(const DecodeParams&);

}  // namespace cuda
}  // namespace tokenmill
