// Rows of the queries and keys of one sequence.
#pragma once
#include "attention/params.h"
#include "cuda/sequences.cuh"

namespace tokenmill::cuda {

// Positions within a sequence are ints on the device; the host rejects longer sequences.
constexpr int64_t kMaxLength = int64_t{1} << 29;

struct Sequence {
  int q_start, k_start, q_length, k_length;
};

// Sequence b, for reading.
__device__ inline Sequence sequence_of(const AttentionParams& p, int64_t b) {
  if (!p.cu_seqlens_q) return {0, 0, static_cast<int>(p.seqlen_q), static_cast<int>(p.seqlen_k)};
  const int q = clamped_end(p.cu_seqlens_q, b, p.seqlen_q);
  const int k = clamped_end(p.cu_seqlens_k, b, p.seqlen_k);
  const int q_length = clamped_end(p.cu_seqlens_q, b + 1, p.seqlen_q) - q;
  const int k_length = clamped_end(p.cu_seqlens_k, b + 1, p.seqlen_k) - k;
  return {q, k, q_length > 0 ? q_length : 0, k_length > 0 ? k_length : 0};
}

// Sequence b for a CTA that writes the rows `queries`, which no other sequence has.
__device__ inline Sequence sequence_of(const AttentionParams& p, int64_t b,
                                       const PackedRows& queries) {
  Sequence s = sequence_of(p, b);
  s.q_start = queries.start;
  s.q_length = queries.length;
  return s;
}

__device__ __forceinline__ float* lse_at(const AttentionParams& p, const float* lse, int64_t b,
                                         int64_t start, int64_t h) {
  const int64_t at = p.cu_seqlens_q ? h * p.seqlen_q + start : (b * p.heads + h) * p.seqlen_q;
  return const_cast<float*>(lse) + at;
}

}  // namespace tokenmill::cuda
