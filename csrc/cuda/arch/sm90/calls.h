// Conditions that all sm_90a kernels share, see python/tokenmill/_sm90.py.
#pragma once
#include "cuda/arch/sm90/tensor_map.h"

namespace tokenmill::cuda {

struct MappedTensors {
  MappedRows q, k, v, out;

  bool can_be_mapped() const { return can_map(q) && can_map(k) && can_map(v) && can_map(out); }
};

// With fewer tokens per sequence most of a 64-row tile would be idle.
constexpr int kMinSm90Tokens = 32;

// Packed: tokens per sequence on average.
inline bool has_sm90_tokens(int64_t tokens, const int32_t* cu_seqlens, int64_t batch) {
  return tokens >= kMinSm90Tokens * (cu_seqlens && batch > 1 ? batch : 1);
}

}  // namespace tokenmill::cuda
