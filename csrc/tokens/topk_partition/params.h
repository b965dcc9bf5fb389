// Partition of tokens by score. Free of torch.
#pragma once
#include "core/dtype.h"
#include "cpu/isa.h"

namespace tokenmill {

struct TopkPartitionParams {
  int64_t batch, tokens;
  int64_t k;              // tokens to keep per row, or maximum
  const int32_t* counts;  // [B], tokens to keep; null: k
  DType dtype;
  const void* scores;  // [B, N]
  int64_t scores_batch;
  bool largest, by_score;  // by_score: keep is in score order
  const bool* valid;       // [B, N]; null: all
  int64_t valid_batch;
  int64_t protect_first, protect_last;
  int32_t *keep, *rest;  // [B, k], [B, others], -1 past the last
  int64_t others;        // N - k, with counts N
  void* workspace;       // CUDA
};

// Tokens are ordered by descending keys, and by index among equal keys. The keys of scores lie
// between these two.
constexpr uint32_t kProtectedKey = 0xffffffffu, kInvalidKey = 1;

TOKENMILL_HOST_DEVICE inline bool is_protected(const TopkPartitionParams& p, int64_t i) {
  return i < p.protect_first || i >= p.tokens - p.protect_last;
}

// Tokens to keep in row b; protected tokens are always kept.
TOKENMILL_HOST_DEVICE inline int64_t count_of(const TopkPartitionParams& p, int64_t b) {
  if (!p.counts) return p.k;
  const int64_t minimum = p.protect_first + p.protect_last, count = p.counts[b];
  return count < minimum ? minimum : count > p.k ? p.k : count;
}

int64_t workspace_bytes(const TopkPartitionParams&);  // CUDA

// null, or an error message
const char* launch_cuda(const TopkPartitionParams&, void* stream);

}  // namespace tokenmill

TOKENMILL_CPU_KERNEL(topk_partition, TopkPartitionParams)
